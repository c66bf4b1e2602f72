"""Dtypes stay; with --dtype tensors are rounded, and the config and validation follow."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (
    GOLDEN,
    GOLDEN_NAMES,
    PLAIN,
    CommandLine,
    Edit,
    Tensors,
    config_of,
    entries,
    golden_vectors,
    largest_difference,
    source_tensors,
    stored_tensors,
    write_checkpoint,
)
from speculators.checkpoint.output import rounding
from speculators.convert.eagle import LAYERNORM_MAPPINGS, EagleConverter
from speculators.errors import ConversionError, ValidationError
from speculators.models.eagle import EagleSpeculator

convert = EagleConverter().convert

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def cast(dtype: torch.dtype) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return edit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_without_the_option_the_dtype_stays(
    tmp_path: Path, verifier: Path, dtype: torch.dtype, container: str
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=cast(dtype), container=container)
    out = convert(source, tmp_path / "out", verifier)
    stored = stored_tensors(out)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(stored[name], t.to(dtype)) for name, t in source_tensors().items())
    assert config_of(out)["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert EagleSpeculator.from_pretrained(out).fc.weight.dtype == dtype


def test_without_the_option_each_tensor_of_a_mixed_checkpoint_keeps_its_dtype(
    tmp_path: Path, verifier: Path
) -> None:
    def mix(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float16 if "mlp" in name else torch.bfloat16)

    out = convert(write_checkpoint(tmp_path / "source", edit=mix), tmp_path / "out", verifier)
    for name, tensor in stored_tensors(out).items():
        assert tensor.dtype == (torch.float16 if "mlp" in name else torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_tensor_is_rounded_as_torch_does(
    tmp_path: Path, verifiers: dict[str, Path], log: list[str], name: str, dtype: str
) -> None:
    out = convert(GOLDEN / name, tmp_path / "out", verifiers[name], dtype=dtype)
    stored = stored_tensors(out)
    for source_name, tensor in source_tensors(name).items():
        written = stored.pop(LAYERNORM_MAPPINGS.get(source_name, source_name))
        assert written.dtype == DTYPES[dtype]
        assert torch.equal(written, tensor.to(DTYPES[dtype]))
    assert stored == {}
    assert config_of(out)["torch_dtype"] == dtype
    assert EagleSpeculator.from_pretrained(out).fc.weight.dtype == DTYPES[dtype]
    told = [line for line in log if line.startswith(f"INFO With its tensors rounded to {dtype}")]
    assert len(told) == 1
    numbers = re.search(r"differs from the source's by up to (\S+), at values up to (\S+)", told[0])
    assert numbers is not None
    difference, scale = map(float, numbers.groups())
    assert (difference == 0) == (dtype == "float32")
    assert difference < 0.05 * scale


def test_what_the_log_says_of_rounding_is_so(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    """On other inputs, the output differs by about as much as the log says."""
    out = convert(GOLDEN / PLAIN, tmp_path / "out", verifier, dtype="bfloat16")
    told = next(line for line in log if "by up to" in line)
    g = golden_vectors(PLAIN)
    model = EagleSpeculator.from_pretrained(out, dtype=torch.float32)
    output = model(g["input_ids"], g["hidden_states"]).last_hidden_state
    found = largest_difference(output, g["output_hidden"])
    difference = float(told.split("by up to ")[1].split(",")[0])
    assert difference / 4 < found < difference * 4


@pytest.mark.parametrize("source_dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_from_every_dtype_and_container(
    tmp_path: Path, verifier: Path, source_dtype: torch.dtype, dtype: str, container: str
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=cast(source_dtype), container=container)
    stored = stored_tensors(convert(source, tmp_path / "out", verifier, dtype=dtype))
    for name, tensor in source_tensors().items():
        assert torch.equal(stored[name], tensor.to(source_dtype).to(DTYPES[dtype]))


def test_a_mixed_checkpoint_gets_one_dtype(tmp_path: Path, verifier: Path) -> None:
    def mix(tensors: Tensors) -> None:
        for name in tensors:
            kind = torch.float16 if "mlp" in name else torch.float32
            tensors[name] = tensors[name].to(torch.bfloat16 if "fc" in name else kind)

    source = write_checkpoint(tmp_path / "source", edit=mix)
    out = convert(source, tmp_path / "out", verifier, dtype="bfloat16")
    assert {tensor.dtype for tensor in stored_tensors(out).values()} == {torch.bfloat16}


def test_the_dtype_that_a_checkpoint_has_gives_its_bytes(tmp_path: Path, verifier: Path) -> None:
    as_it_is = convert(GOLDEN / PLAIN, tmp_path / "one", verifier)
    asked = convert(GOLDEN / PLAIN, tmp_path / "two", verifier, dtype="float32")
    for name in ("config.json", "model.safetensors"):
        assert (as_it_is / name).read_bytes() == (asked / name).read_bytes()


@pytest.mark.parametrize("validate", ["--validate", "--no-validate"])
def test_what_float16_cannot_hold_is_an_error(
    tmp_path: Path, verifier: Path, speculators: CommandLine, validate: str
) -> None:
    source = write_checkpoint(
        tmp_path / "source", edit=lambda t: t["layers.0.mlp.up_proj.weight"][3, 5].fill_(-65521)
    )
    arguments = ("convert", "eagle", source, tmp_path / "out", verifier, validate, "--dtype")
    run = speculators(*arguments, "float16")
    assert run.status == 1
    [error] = run.errors
    assert "layers.0.mlp.up_proj.weight has values of 65521, and float16 goes up to 65504" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert speculators(*arguments, "bfloat16").status == 0


def test_short_names(tmp_path: Path, verifier: Path) -> None:
    for short, long in {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.items():
        for dtype in (short, long):
            convert(GOLDEN / PLAIN, tmp_path / dtype, verifier, dtype=dtype, validate=False)
        for name in ("config.json", "model.safetensors", "conversion.json"):
            assert (tmp_path / short / name).read_bytes() == (tmp_path / long / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float64", "fp8", "BF16", "int8", ""])
def test_other_dtypes_are_refused(
    tmp_path: Path, verifier: Path, speculators: CommandLine, dtype: str
) -> None:
    with pytest.raises(ConversionError, match=f"The dtype {dtype} is not known; choose one of"):
        convert(GOLDEN / PLAIN, tmp_path / "out", verifier, dtype=dtype)
    arguments = ("convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier)
    assert speculators(*arguments, "--dtype", dtype).status == 2
    assert entries(tmp_path) == []


def test_validation_finds_numbers_that_are_not_the_nearest(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncate instead of rounding: half of the numbers are off by one in the last bit."""

    def cut_off(values: Any) -> bytes:
        return bytes((values.view("<u4") >> 16).astype("<u2").tobytes())

    monkeypatch.setitem(rounding._ROUND, "BF16", cut_off)
    with pytest.raises(ValidationError, match=r"differs from .* rounded to bfloat16"):
        convert(GOLDEN / PLAIN, tmp_path / "out", verifier, dtype="bfloat16")
    assert entries(tmp_path) == []


def test_a_dry_run_shows_both_types(
    tmp_path: Path, verifier: Path, speculators: CommandLine
) -> None:
    arguments = ("convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, "--dry-run")
    run = speculators(*arguments, "--dtype", "float16")
    assert run.status == 0
    assert run.stdout.count("F32 -> F16") == 10
    assert '~ torch_dtype: "float32" -> "float16"' in run.stdout
    assert "(149.6 kB)" in run.stdout
    assert "(299.3 kB)" in speculators(*arguments).stdout
