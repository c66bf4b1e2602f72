"""`validate` says what a record leaves open, and refuses one that contradicts its directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import GOLDEN, PLAIN, write_checkpoint
from speculators.convert.eagle import EagleConverter
from speculators.errors import ValidationError

validate = EagleConverter().validate
SOURCE = GOLDEN / PLAIN

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def out(tmp_path: Path, converted: dict[str, Path]) -> Path:
    shutil.copytree(converted[PLAIN], tmp_path / "out")
    return tmp_path / "out"


def change(out: Path, edit: Edit) -> None:
    path = out / "conversion.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def warnings(log: list[str]) -> list[str]:
    return [line for line in log if line.startswith("WARNING")]


def test_a_whole_record_has_no_gap(out: Path, log: list[str]) -> None:
    validate(out)
    validate(out, SOURCE)
    assert warnings(log) == []


GAPS: dict[str, tuple[Edit, str]] = {
    "no hashes": (
        lambda r: [file.update(sha256=None) for file in r["files"].values()],
        "lacks a hash of config.json, model.safetensors: only the size was checked",
    ),
    "no hash of the weights": (
        lambda r: r["files"]["model.safetensors"].pop("sha256"),
        "lacks a hash of model.safetensors",
    ),
    "no files": (lambda r: r["files"].clear(), "lacks the files config.json, model.safetensors"),
    "no file of weights": (
        lambda r: r["files"].pop("model.safetensors"),
        "lacks the files model.safetensors: whether they are those that were written",
    ),
    "no tensors": (lambda r: r["tensors"].clear(), "lacks the tensors: what they were made of"),
    "no files of the source": (
        lambda r: r["source"]["files"].clear(),
        "lacks the files of the source",
    ),
    "no hashes of the source": (
        lambda r: [file.update(sha256=None) for file in r["source"]["files"].values()],
        "the source is known by its size only",
    ),
    "unchecked by the conversion": (
        lambda r: r["unchecked"].append("The moon was not looked at"),
        "could not check this: The moon was not looked at",
    ),
}


@pytest.mark.parametrize("case", GAPS)
def test_a_gap_in_the_record_is_told(out: Path, log: list[str], case: str) -> None:
    edit, clause = GAPS[case]
    change(out, edit)
    validate(out)
    assert any(clause in line for line in warnings(log)), warnings(log)


CONTRADICTIONS: dict[str, tuple[Edit, str]] = {
    "another version": (lambda r: r.update(speculators_version="9.9"), "of speculators_version"),
    "another verifier": (lambda r: r["verifier"].update(name="org/other"), "of the verifier"),
    "another dtype": (lambda r: r.update(dtype="bfloat16"), "of the dtype"),
    "other tensors": (lambda r: r["tensors"].pop("fc.weight"), "of the tensors"),
}


@pytest.mark.parametrize("source", [None, SOURCE])
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_record_that_contradicts_the_directory_is_an_error(
    out: Path, case: str, source: Path | None
) -> None:
    edit, clause = CONTRADICTIONS[case]
    change(out, edit)
    with pytest.raises(ValidationError, match=rf"has another value {clause}"):
        validate(out, source)


def test_other_weights_in_the_folder_are_told(out: Path, log: list[str]) -> None:
    (out / "model-2.safetensors").write_bytes((out / "model.safetensors").read_bytes())
    validate(out)
    assert any("also has model-2.safetensors" in line for line in log)


def test_another_source_than_the_recorded_one_is_told(
    tmp_path: Path, out: Path, log: list[str]
) -> None:
    other = write_checkpoint(tmp_path / "other")
    validate(out, other)
    assert any(
        f"{other} is not what was converted, by conversion.json: that is {SOURCE}" in line
        for line in warnings(log)
    ), warnings(log)
    assert log[-1] == f"SUCCESS Valid: {out}"


def test_other_pieces_than_the_recorded_ones_are_told(out: Path, log: list[str]) -> None:
    change(out, lambda record: record["tensors"].update({"fc.weight": "head.weight"}))
    validate(out, SOURCE)
    assert any("says that fc.weight was made of other tensors" in line for line in warnings(log))
