"""Tensors written from pieces: whole tensors, slices, concatenations and constants."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.checkpoint.files.safetensors_file import read_safetensors_file
from speculators.checkpoint.output.writer import contiguous_chunks, write_safetensors_file
from speculators.checkpoint.tensor import Constant, PlannedTensor, TensorInfo

ROWS = torch.arange(6 * 5, dtype=torch.float32).reshape(6, 5)


@pytest.fixture
def source(tmp_path: Path) -> TensorInfo:
    save_file({"qkv": ROWS, "other": torch.ones(3)}, tmp_path / "source.safetensors")
    return read_safetensors_file(tmp_path / "source.safetensors")["qkv"]


def written(tmp_path: Path, **tensors: PlannedTensor) -> dict[str, Tensor]:
    """Write tensors, and read them with the safetensors library."""
    write_safetensors_file(tmp_path / "out.safetensors", tensors)
    return load_file(tmp_path / "out.safetensors")


def test_a_fused_tensor_is_taken_apart(tmp_path: Path, source: TensorInfo) -> None:
    q, k = source.slice(0, 4), source.slice(4, 6)
    found = written(tmp_path, q=PlannedTensor.copy_of(q), k=PlannedTensor.copy_of(k))
    assert torch.equal(found["q"], ROWS[:4])
    assert torch.equal(found["k"], ROWS[4:])
    assert (q.label, k.label) == ("qkv[0:4]", "qkv[4:6]")


def test_a_slice_of_a_slice(tmp_path: Path, source: TensorInfo) -> None:
    inner = source.slice(2, 6).slice(1, 3)
    assert inner.label == "qkv[3:5]"
    assert torch.equal(written(tmp_path, x=PlannedTensor.copy_of(inner))["x"], ROWS[3:5])


def test_a_slice_of_a_transposed_tensor(tmp_path: Path, source: TensorInfo) -> None:
    transposed = TensorInfo("t", "F32", (5, 6), source.file, source.offset, (1, 5))
    found = written(tmp_path, x=PlannedTensor.copy_of(transposed.slice(1, 4)))
    assert torch.equal(found["x"], ROWS.T[1:4])


def test_pieces_follow_each_other(tmp_path: Path, source: TensorInfo) -> None:
    zeros = Constant("zeros", "F32", bytes(2 * 5 * 4))
    planned = PlannedTensor("F32", (6, 5), (source.slice(4, 6), zeros, source.slice(0, 2)))
    expected = torch.cat((ROWS[4:], torch.zeros(2, 5), ROWS[:2]))
    assert torch.equal(written(tmp_path, x=planned)["x"], expected)
    assert planned.label == "qkv[4:6] + zeros + qkv[0:2]"
    assert planned.sources == (source.slice(4, 6), source.slice(0, 2))


def test_pieces_are_rounded_and_tables_are_not(tmp_path: Path, source: TensorInfo) -> None:
    table = Constant("a table", "I64", torch.arange(3).numpy().tobytes())
    found = written(
        tmp_path,
        x=PlannedTensor("BF16", (2, 5), (source.slice(1, 3),)),
        table=PlannedTensor("I64", (3,), (table,)),
    )
    assert torch.equal(found["x"], ROWS[1:3].to(torch.bfloat16))
    assert torch.equal(found["table"], torch.arange(3))


def test_the_bytes_of_a_slice(source: TensorInfo) -> None:
    assert b"".join(contiguous_chunks(source.slice(2, 4))) == ROWS[2:4].numpy().tobytes()
