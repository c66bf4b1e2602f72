"""Numbers that are none: found in the bytes of tensors, in pieces, without torch."""

from collections.abc import Callable, Iterable

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import TensorInfo
from speculators.errors import CheckpointError

__all__ = ["check_numbers"]

CHUNK_BYTES = 1 << 20

SPECIAL = {
    "F64": (8, 0x7FF0000000000000),
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
    "F8_E8M0": (1, 0xFF),
}
"""Dtype → its bytes, and the bits that are set in NaN and infinities and in no other number."""


def check_numbers(tensors: Iterable[TensorInfo], advance: Callable[[int], None]) -> None:
    """Check that the floating-point numbers of tensors are finite.

    Args:
        tensors: the tensors; those of other dtypes are passed over.
        advance: called with the number of bytes done since the last call.

    Raises:
        CheckpointError: if one is NaN or infinite, or a file cannot be read.

    """
    import numpy as np

    for info in tensors:
        if info.dtype not in SPECIAL:
            advance(info.nbytes)
            continue
        size, bits = SPECIAL[info.dtype]
        done = 0
        for chunk in contiguous_chunks(info, CHUNK_BYTES):
            numbers = np.frombuffer(chunk, f"<u{size}")
            wrong = (numbers & numbers.dtype.type(bits)) == bits
            if wrong.any():
                raise CheckpointError(
                    f"{info.file}: {info.label} has NaN or infinite numbers, the first at "
                    f"{_place(info, done + int(wrong.argmax()))}; train or fetch it again."
                )
            done += len(numbers)
            advance(len(chunk))


def _place(info: TensorInfo, element: int) -> str:
    """Where an element is, as indices."""
    indices = []
    for size in reversed(info.shape):
        element, index = divmod(element, size)
        indices.append(index)
    return str(list(reversed(indices)))
