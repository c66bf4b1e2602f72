"""A command reads each config.json once, and says once what a checkpoint is; the rest is passed on.

What transformers reads for itself is not counted.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers import GOLDEN, PLAIN, CommandLine
from pair import NEW_TOKENS, PROMPTS, Pair, make_pair
from speculators.checkpoint.files import json_file
from speculators.families import recognition


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """The folder of a config.json → how often it was read."""
    counts: Counter[Path] = Counter()
    read_json = json_file.read_json

    def counted(path: Path, **options: Any) -> dict[str, Any]:
        if path.name == "config.json":
            counts[path.parent] += 1
        return read_json(path, **options)

    for module in list(sys.modules.values()):
        if module.__name__.startswith("speculators") and hasattr(module, "read_json"):
            monkeypatch.setattr(module, "read_json", counted)
    return counts


@pytest.mark.parametrize("options", [[], ["--acceptance-only"]], ids=["all", "acceptance"])
def test_evaluate(
    pair: Pair,
    tmp_path: Path,
    speculators: CommandLine,
    read: Counter[Path],
    options: list[str],
) -> None:
    (tmp_path / "prompts").write_text(json.dumps(PROMPTS[0]))
    given = [f"--prompts={tmp_path / 'prompts'}", f"--max-new-tokens={NEW_TOKENS}"]
    run = speculators("evaluate", pair.draft, *given, *options)
    assert run.status == 0, run.stderr
    assert read == {pair.draft: 1, pair.verifier: 1}


def test_validate(
    converted: dict[str, Path], verifier: Path, speculators: CommandLine, read: Counter[Path]
) -> None:
    assert speculators("validate", converted[PLAIN]).status == 0
    assert read == {converted[PLAIN]: 1, verifier: 1}


def test_convert_auto(
    tmp_path: Path,
    verifier: Path,
    speculators: CommandLine,
    read: Counter[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recognised = []
    recognise = recognition.recognise

    def counted(*arguments: Any) -> recognition.Recognition:
        recognised.append(recognise(*arguments))
        return recognised[-1]

    for module in list(sys.modules.values()):
        if module.__name__.startswith("speculators") and hasattr(module, "recognise"):
            monkeypatch.setattr(module, "recognise", counted)
    out = tmp_path / "out"
    assert speculators("convert", "auto", GOLDEN / PLAIN, out, verifier).status == 0
    assert len(recognised) == 1
    assert {*read.values()} == {1}
    (_written,) = read.keys() - {GOLDEN / PLAIN, verifier}
