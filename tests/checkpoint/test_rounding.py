"""Rounding without torch gives torch's numbers, bit for bit."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from speculators.checkpoint.output.rounding import round_to
from speculators.checkpoint.output.writer import write_safetensors_file
from speculators.checkpoint.tensor import FLOATS, PlannedTensor, TensorInfo
from speculators.errors import CheckpointError, ConversionError
from speculators.models.tensors import TORCH_DTYPES

PAIRS = [(source, target) for source in FLOATS for target in FLOATS]
INTEGERS = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


def tensor_of(data: bytes, kind: str) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[kind])


def check_as_torch(source: str, target: str, data: bytes) -> None:
    """Check values that do not overflow: the same bits, or NaN (whose bits torch leaves open)."""
    before = tensor_of(data, source)
    expected = before.to(TORCH_DTYPES[target])
    kept = before.isinf() | ~expected.isinf()
    if not kept.any():
        return
    before, expected = before[kept], expected[kept]
    data = before.view(torch.uint8).numpy().tobytes()
    found = tensor_of(round_to(target, source, data), target)
    numbers = ~expected.isnan()
    bits = INTEGERS[target]
    assert torch.equal(found.isnan(), ~numbers)
    assert torch.equal(found[numbers].view(bits), expected[numbers].view(bits))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_16_bit_pattern(source: str, target: str) -> None:
    """Each pattern is a 16-bit number, and the upper and the lower half of a float32."""
    patterns = np.arange(1 << 16, dtype="<u2")
    if source != "F32":
        check_as_torch(source, target, patterns.tobytes())
        return
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        check_as_torch(source, target, (patterns.astype("<u4") << 16 | lower).tobytes())
    for upper in (0, 0x8000, 0x3380, 0x3880, 0x387F, 0x477F, 0x3F80, 0x7F7F, 0x7F80, 0xFFFF):
        check_as_torch(source, target, (patterns.astype("<u4") | upper << 16).tobytes())


@pytest.mark.parametrize("target", FLOATS)
def test_random_float32(target: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    check_as_torch("F32", target, bits.astype("<u4").tobytes())
    weights = random.standard_normal(1 << 20, dtype=np.float32) * 0.02
    check_as_torch("F32", target, weights.tobytes())


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_halves_go_to_the_even_neighbour(target: str) -> None:
    """Check half-way between two neighbours, and next to it, without relying on torch."""
    one = torch.ones((), dtype=TORCH_DTYPES[target])
    step = torch.finfo(TORCH_DTYPES[target]).eps
    for n in range(6):
        half = one.item() + (n + 0.5) * step
        above = float(np.nextafter(np.float32(half), np.float32(4)))
        below = float(np.nextafter(np.float32(half), np.float32(0)))
        even, up, down = (
            tensor_of(round_to(target, "F32", np.float32(value).tobytes()), target).item()
            for value in (half, above, below)
        )
        assert (down, up) == (1 + n * step, 1 + (n + 1) * step)
        assert even == 1 + (n + n % 2) * step


@pytest.mark.parametrize("target", FLOATS)
def test_nan_and_infinity_stay_what_they_are(target: str) -> None:
    # The last NaN has its payload only in the lower half.
    bits = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001], dtype="<u4")
    values = tensor_of(round_to(target, "F32", bits.tobytes()), target)
    assert values[:2].tolist() == [float("inf"), float("-inf")]
    assert values[2:].isnan().all()


@pytest.mark.parametrize("target", ["F16", "BF16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_would_become_infinite_is_an_error(target: str, sign: int) -> None:
    largest = FLOATS[target].largest
    assert largest == torch.finfo(TORCH_DTYPES[target]).max
    spacing = (
        largest
        - torch.nextafter(
            torch.tensor(largest, dtype=TORCH_DTYPES[target]),
            torch.zeros((), dtype=TORCH_DTYPES[target]),
        ).item()
    )
    half = np.float32(largest + spacing / 2)
    just_below = np.nextafter(half, np.float32(0))
    data = (sign * np.array([1, just_below], dtype="<f4")).tobytes()
    assert tensor_of(round_to(target, "F32", data), target)[1].item() == sign * largest
    with pytest.raises(OverflowError) as caught:
        round_to(target, "F32", (sign * np.array([1, half, 2], dtype="<f4")).tobytes())
    assert caught.value.args[0] == half


# In a file


def write(path: Path, tensor: Tensor, dtype: str | None, kind: str = "F32") -> bytes:
    """Write a tensor from a file of its own; return the bytes written after the header."""
    path.with_suffix(".raw").write_bytes(b"skipped!" + tensor.view(torch.uint8).numpy().tobytes())
    info = TensorInfo("w", kind, tuple(tensor.shape), path.with_suffix(".raw"), 8)
    write_safetensors_file(path, {"w": PlannedTensor.copy_of(info, dtype)})
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_the_message_names_tensor_type_and_value(tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError,
        match=re.escape("w.raw: w has values of 70000, and float16 goes up to 65504 only; choose"),
    ):
        write(tmp_path / "w.safetensors", torch.tensor([1.0, -70000.0]), "F16")


@pytest.mark.parametrize("elements", [0, 1, 131_071, 131_072, 131_073, 300_001])
@pytest.mark.parametrize("target", FLOATS)
def test_tensors_longer_than_a_chunk(tmp_path: Path, elements: int, target: str) -> None:
    tensor = torch.randn(elements, generator=torch.Generator().manual_seed(elements))
    found = write(tmp_path / "w.safetensors", tensor, target)
    assert found == tensor.to(TORCH_DTYPES[target]).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("transpose", [lambda t: t.T, lambda t: t[::2, 1::3]])
def test_tensors_that_do_not_lie_in_order(
    tmp_path: Path, transpose: Callable[[Tensor], Tensor]
) -> None:
    whole = torch.randn(700, 500, generator=torch.Generator().manual_seed(0))
    view = transpose(whole)
    strides = tuple(int(stride) for stride in view.stride())
    raw = tmp_path / "w.raw"
    raw.write_bytes(whole.numpy().tobytes())
    info = TensorInfo("w", "F32", tuple(view.shape), raw, 4 * int(view.storage_offset()), strides)
    write_safetensors_file(tmp_path / "w.safetensors", {"w": PlannedTensor.copy_of(info, "BF16")})
    data = (tmp_path / "w.safetensors").read_bytes()
    expected = view.contiguous().to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert data.endswith(expected)


def test_a_file_that_ends_within_an_element(tmp_path: Path) -> None:
    raw = tmp_path / "w.raw"
    raw.write_bytes(bytes(401))
    info = TensorInfo("w", "F32", (100,), raw, 2)
    with pytest.raises(CheckpointError, match="truncated: it ends within the tensor w"):
        write_safetensors_file(
            tmp_path / "w.safetensors", {"w": PlannedTensor.copy_of(info, "F16")}
        )
