"""What commands print with --json: one object, with the error if there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import (
    GOLDEN,
    PLAIN,
    CommandLine,
    Run,
    config_of,
    fork_processes,
    stored_tensors,
)
from schemas import PRINTED
from speculators.ending import Ending

SOURCE = GOLDEN / PLAIN


def printed(run: Run, command: str) -> dict[str, Any]:
    """What was printed, which has to fit the schema and the exit status."""
    PRINTED[command].model_validate_json(run.stdout)
    result: dict[str, Any] = json.loads(run.stdout)
    assert result.keys() == PRINTED[command].model_fields.keys()
    assert result["ok"] == (run.status == 0)
    assert (result["error"] is None) == result["ok"]
    return result


def test_a_conversion(tmp_path: Path, verifier: Path, speculators: CommandLine) -> None:
    arguments = ["convert", "eagle", SOURCE, tmp_path / "out", verifier, "--no-validate", "--json"]
    planned = printed(speculators(*arguments, "--dry-run"), "convert")
    assert not (tmp_path / "out").exists()
    told = printed(speculators(*arguments), "convert")
    assert (planned.pop("written"), told.pop("written")) == (False, True)
    assert told == planned
    assert told["output"] == str(tmp_path / "out")
    assert (told["family"], told["features"]) == ("eagle", ["embedding"])
    assert told["config"] == config_of(tmp_path / "out")
    tensors = stored_tensors(tmp_path / "out")
    assert told["tensors"].keys() == tensors.keys()
    assert told["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert told["validated"] is False

    again = speculators(*arguments)
    failed = printed(again, "convert")
    assert failed["error"] == again.errors[0]
    assert failed["family"] is None


def test_a_validation(tmp_path: Path, converted: dict[str, Path], speculators: CommandLine) -> None:
    run = speculators("validate", converted[PLAIN], "--source", SOURCE, "--json", "--quiet")
    assert printed(run, "validate") == {
        "schema_version": 1,
        "ok": True,
        "error": None,
        "warnings": [],
        "output": str(converted[PLAIN]),
        "source": str(SOURCE),
        "proven": [
            f"has the config and the tensors that {SOURCE} gives",
            "computes what its tensors say",
        ],
        "left_open": [],
    }
    run = speculators("validate", tmp_path, "--json")
    failed = printed(run, "validate")
    assert failed["error"] == run.errors[0]
    assert failed["source"] is None


def test_warnings_are_told(tmp_path: Path, verifier: Path, speculators: CommandLine) -> None:
    """Also with --quiet, which keeps them out of the log."""
    speculators("convert", "eagle", SOURCE, tmp_path / "out", verifier, "--no-validate")
    run = speculators("validate", tmp_path / "out", "--json", "--quiet")
    assert run.stderr == ""
    told = printed(run, "validate")
    assert "without validation" in told["warnings"][0]
    assert told["proven"] == ["computes what its tensors say"]
    assert told["left_open"] == told["warnings"]


def test_a_batch(
    tmp_path: Path, verifier: Path, speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_processes(monkeypatch)
    entry = {"input": str(SOURCE), "base_model": str(verifier), "validate": False}
    manifest = tmp_path / "batch.json"
    manifest.write_text(
        json.dumps([entry | {"output": "one"}, entry | {"output": "two", "input": "./none"}])
    )
    told = printed(speculators("batch", manifest, "--dry-run", "--json"), "batch")
    assert [it["outcome"] for it in told["entries"]] == ["to do", "to do"]

    run = speculators("batch", manifest, "--json")
    told = printed(run, "batch")
    assert run.status == 1
    assert told["error"] == "1 of 2 entries failed."
    one, two = told["entries"]
    assert (one["outcome"], one["error"]) == ("converted", None)
    assert one["output"] == str(tmp_path / "one")
    assert two["outcome"] == "failed"
    assert "none does not exist" in two["error"]

    (tmp_path / "wrong.json").write_text("[]")
    run = speculators("batch", tmp_path / "wrong.json", "--json")
    assert printed(run, "batch")["error"] == run.errors[0]


COMMANDS: dict[str, list[str]] = {
    "inspect": [],
    "convert": ["OUT", "VERIFIER", "--dry-run"],
    "validate": [],
    "diff": ["OTHER"],
    "evaluate": [],
    "batch": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_error(
    tmp_path: Path, speculators: CommandLine, command: str
) -> None:
    name = [command, "auto"] if command == "convert" else [command]
    run = speculators(*name, tmp_path / "none", *COMMANDS[command], "--json")
    assert run.status == 1
    told = json.loads(run.stdout)
    assert (told["ok"], told["error"], told["warnings"]) == (False, run.errors[0], [])
    if command != "evaluate":
        printed(run, command)
    else:
        assert told.keys() == Ending.model_fields.keys()


def test_an_unknown_kind_is_an_error(tmp_path: Path, speculators: CommandLine) -> None:
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    save_file({"bridge.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    run = speculators("inspect", tmp_path, "--json", "--quiet")
    told = printed(run, "inspect")
    assert told["error"] == run.errors[0]
    assert "has the key a twice" in told["warnings"][0]


def test_wrong_usage_prints_nothing(speculators: CommandLine) -> None:
    for options in (["--overwrite"], ["--top-p=0"]):
        run = speculators("evaluate", "draft", "--json", *options)
        assert (run.status, run.stdout) == (2, "")


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
def test_a_batch_of_one_family(
    tmp_path: Path,
    verifier: Path,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """`convert eagle --manifest FILE` is `batch FILE --family eagle`."""
    fork_processes(monkeypatch)
    entry = {"input": str(SOURCE), "base_model": str(verifier), "validate": False, "output": "out"}
    (tmp_path / "batch.json").write_text(json.dumps([entry]))
    run = speculators("batch", tmp_path / "batch.json", "--family", family, "--quiet")
    older = speculators("convert", family, "--manifest", tmp_path / "batch.json", "--quiet")
    assert run.status == older.status == (0 if family == "eagle" else 1)
    assert (tmp_path / "out").exists() == (family == "eagle")
