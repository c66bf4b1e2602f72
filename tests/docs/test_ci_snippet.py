"""The workflow of docs/installation.md: its commands work, in their order."""

import shlex
from pathlib import Path

import pytest
import yaml

from helpers import CommandLine, write_checkpoint
from pages import ROOT, blocks


def test_its_commands_work(
    tmp_path: Path, verifier: Path, speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [it for it in blocks("docs/installation.md") if it.language == "yaml"]
    workflow = yaml.safe_load(block.text)
    commands = [step["run"] for step in workflow["jobs"]["convert"]["steps"] if "run" in step]
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "draft")
    ours = [shlex.split(it.partition(">")[0]) for it in commands if it.startswith("speculators ")]
    assert [it[1] for it in ours] == ["convert", "validate", "diff"]
    for _, *words in ours:
        run = speculators(*(str(verifier) if it == "$VERIFIER" else it for it in words))
        assert run.status == 0, run.stderr
    assert (tmp_path / "converted" / "model.safetensors").is_file()
    for command in commands:
        for word in shlex.split(command):
            if word.startswith("./speculators/"):
                assert (ROOT / word.removeprefix("./speculators/")).exists()
