"""Help in narrow terminals, and what is told about words that are not known."""

import re
import shutil

import pytest

from commands import COMMANDS
from helpers import CommandLine


def unfolded(text: str) -> str:
    """Text without the borders and line breaks of panels."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


PAGES = [(), ("convert",), *COMMANDS]


@pytest.mark.parametrize("columns", [30, 50, 80, 100])
@pytest.mark.parametrize("command", PAGES, ids=" ".join)
def test_help_is_never_cut(
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = unfolded(speculators(*command, "--help").stdout)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert shutil.get_terminal_size().columns == columns
    run = speculators(*command, "--help")
    assert run.status == 0
    assert "…" not in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= columns
    for option in re.findall(r"(?<= )--[a-z-]+(?= )", words):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", run.stdout), option
    if columns >= 50:
        shown = unfolded(run.stdout)
        for sentence in re.findall(r"[A-Z][a-z ]{20,}\.", words):
            assert re.sub(r"\s", "", sentence) in re.sub(r"\s", "", shown), sentence


@pytest.mark.parametrize("command", ["eagle", "eagle3", "auto"])
def test_required_arguments_look_required(speculators: CommandLine, command: str) -> None:
    shown = speculators("convert", command, "--help").stdout
    assert len(re.findall(r"│ \* .*(?:\n│   .*)*?\[required\]", shown)) == 3


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["convrt"], "convert"),
        (["batsh"], "batch"),
        (["convert", "eagel", "in", "out", "base"], "eagle"),
        (["convert", "Eagle3", "in", "out", "base"], "eagle3"),
        (["convert", "eagle", "in", "out", "base", "--dtype", "flot16"], "float16"),
        (["convert", "eagle", "in", "out", "base", "--dtype", "BF16"], "bf16"),
        (["convert", "eagle", "in", "out", "base", "--overwrit"], "--overwrite"),
        (["convert", "eagle3", "in", "out", "base", "--norm-output", "head_only"], "head-only"),
        (["convert", "eagle3", "in", "out", "base", "--aux-numbering", "inputs"], "input"),
        (["evaluate", "draft", "--proposal", "gredy"], "greedy"),
        (["export", "draft", "out", "--to", "sglng"], "sglang"),
        (["batch", "batch.yaml", "--family", "eagel"], "eagle"),
    ],
    ids=lambda it: it[-1] if isinstance(it, list) else None,
)
def test_the_nearest_spelling_is_named(
    speculators: CommandLine, arguments: list[str], meant: str
) -> None:
    run = speculators(*arguments)
    assert run.status == 2
    said = unfolded(run.stderr)
    assert re.search(rf"(?i:did you mean|possible options:?) .*{meant}", said), said
    assert "Value error" not in said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--aux-numbering", "sideways"),
        ("--norm-output", "both"),
        ("--aux-layers", "1,,2"),
        ("--mask-token-id", "-3"),
    ],
)
@pytest.mark.parametrize("family", ["eagle3", "auto"])
def test_a_wrong_value_of_a_familys_option_is_wrong_usage(
    speculators: CommandLine, family: str, option: str, value: str
) -> None:
    """It is told before anything is read."""
    run = speculators("convert", family, "none", "out", "none", f"{option}={value}")
    assert run.status == 2
    assert option in run.stderr
    assert value in run.stderr


def test_what_is_far_from_everything_gets_no_advice(speculators: CommandLine) -> None:
    for arguments in (["transmogrify"], ["export", "a", "b", "--to", "paper"]):
        run = speculators(*arguments)
        assert run.status == 2
        assert "did you mean" not in run.stderr.lower()
