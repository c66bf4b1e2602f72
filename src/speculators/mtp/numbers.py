"""Numbers that are none: found in the bytes of tensors as they are copied, without torch."""

from speculators.checkpoint.output.writer import Look
from speculators.checkpoint.tensor import TensorInfo
from speculators.errors import CheckpointError

__all__ = ["finite"]

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


def finite(info: TensorInfo) -> Look | None:
    """Check that the numbers of a tensor are finite, while its bytes are written.

    Args:
        info: the tensor.

    Returns:
        what its bytes are passed to, in order and some at a time; it raises ``CheckpointError`` at
        a number that is NaN or infinite. ``None`` if the dtype has no such numbers.

    """
    import numpy as np

    if info.dtype not in SPECIAL:
        return None
    size, bits = SPECIAL[info.dtype]
    sign, largest, done = 1 << (8 * size - 1), np.maximum.reduce, 0

    def look(chunk: memoryview) -> None:
        nonlocal done
        numbers = np.frombuffer(chunk, f"<u{size}")
        # Their bits are the highest after the sign's. So as unsigned integers, negative ones are
        # the greatest of all, and as signed integers, positive ones are.
        if largest(numbers) >= sign | bits or largest(numbers.view(f"<i{size}")) >= bits:
            wrong = (numbers & numbers.dtype.type(bits)) == bits
            raise CheckpointError(
                f"{info.file}: {info.label} has NaN or infinite numbers, the first at "
                f"{_place(info, done + int(wrong.argmax()))}; train or fetch it again."
            )
        done += len(numbers)

    return look


def _place(info: TensorInfo, element: int) -> str:
    """Where an element is, as indices."""
    indices = []
    for size in reversed(info.shape):
        element, index = divmod(element, size)
        indices.append(index)
    return str(list(reversed(indices)))
