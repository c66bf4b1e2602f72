"""A directory that is nearly called as one that is there."""

import json
from pathlib import Path

import pytest

from helpers import GOLDEN, PLAIN, CommandLine
from hub_server import HubServer, patch_hub
from speculators.checkpoint.repository import open_repository
from speculators.errors import CheckpointError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here" / "converted").mkdir(parents=True)
    (tmp_path / "here" / "drafts" / "eagle-8b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    # Nothing answers there: whoever asked would fail in another way.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("convrted", "./converted"),
        ("./Converted2", "./converted"),
        ("converted/", "./converted"),
        ("./drafts/eagle-8", "./drafts/eagle-8b"),
        ("drafts/eagle_8b/", "./drafts/eagle-8b"),
        ("./draft/eagle-8b", "./drafts/eagle-8b"),
        ("draft/eagle_8b/", "./drafts/eagle-8b"),
    ],
)
def test_the_nearest_is_named_and_nobody_is_asked(here: Path, given: str, meant: str) -> None:
    if given == "converted/":
        (here / "converted").rename(here / "convertd")
        meant = "./convertd"
    with pytest.raises(CheckpointError) as error:
        open_repository(given)
    assert f"does not exist (did you mean {meant}?)" in str(error.value).replace(" here", "")


def test_an_empty_name_is_not_the_current_directory(speculators: CommandLine) -> None:
    """As a variable of a shell is that nobody set."""
    for command in (("inspect", ""), ("convert", "eagle", GOLDEN / PLAIN, "out", "")):
        run = speculators(*command)
        assert run.status == 1
        assert "No name is given; give a directory, or a Hugging Face id." in run.errors[0]


def test_an_absolute_path(here: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        open_repository(str(here / "convrted"))
    assert f"(did you mean {here / 'converted'}?)" in str(error.value)


@pytest.mark.parametrize("command", ["inspect", "validate", "batch", "export", "publish"])
def test_every_command_tells_it(speculators: CommandLine, command: str) -> None:
    more = {"export": ["out", "--to", "eagle"], "publish": ["org/draft", "--dry-run"]}
    run = speculators(command, "convrted", *more.get(command, []))
    assert run.status == 1
    assert "(did you mean ./converted?)" in run.errors[0]


def test_the_verifier_too(speculators: CommandLine) -> None:
    run = speculators("convert", "eagle", GOLDEN / PLAIN, "out", "convrted")
    assert run.status == 1
    assert "The verifier cannot be read: convrted does not exist here" in run.errors[0]


def test_an_id_is_still_looked_for_on_the_hub(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, speculators: CommandLine
) -> None:
    """Also where a directory is nearly called like it; and names that nothing is like."""
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        server.add_repo("drafts/eagle-7b", GOLDEN / PLAIN)
        server.add_repo("gpt2", GOLDEN / PLAIN)
        near = speculators("inspect", "drafts/eagle-7b", "--json")
        assert near.status == 0
        assert json.loads(near.stdout)["name"] == "drafts/eagle-7b"
        (warning,) = near.messages
        assert warning.startswith("drafts/eagle-7b does not exist here (did you mean ./drafts/eagl")
        assert speculators("inspect", "gpt2", "--json").status == 0


def test_what_would_lie_in_a_directory_here_is_told_before_the_hub_is_asked(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, speculators: CommandLine
) -> None:
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        for name in ("drafts/hass", "draft/eagle-8b", "org/eagle-8b"):
            server.add_repo(name, GOLDEN / PLAIN)
        said = "does not exist here{}: it is taken for a Hugging Face id"
        for name, meant in (
            ("drafts/hass", ""),
            ("draft/eagle-8b", " (did you mean ./drafts/eagle-8b?)"),
        ):
            (warning,) = speculators("inspect", name, "--json").messages
            assert warning == f"{name} {said.format(meant)}"
        assert not speculators("inspect", "org/eagle-8b", "--json").messages
