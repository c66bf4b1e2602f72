"""What is known about a stored tensor without reading its data."""

import math
from dataclasses import dataclass
from pathlib import Path

from speculators.errors import CheckpointError, printable

__all__ = ["DTYPE_BITS", "MAX_SIZE", "TensorInfo", "check_name", "check_sizes", "describe_shape"]

MAX_NAME = 1000
MAX_AXES = 64
MAX_SIZE = 1 << 63  # PyTorch's and safetensors' own sizes are 64-bit

# Names and sizes as in the safetensors format.
DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: its name, its type, and where its bytes lie.

    Attributes:
        name: as stored in the checkpoint.
        dtype: a key of ``DTYPE_BITS``.
        shape: sizes, outermost first; ``()`` for a scalar.
        file: the file that holds the data.
        offset: position in ``file`` of the first element, in bytes.
        strides: distance between neighbours along each axis, in elements, or ``None``
            when the elements lie contiguously in row-major order.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        """How many elements the tensor has (1 for a scalar, 0 for an empty one)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes, as a contiguous tensor."""
        return self.elements * DTYPE_BITS[self.dtype] // 8


def describe_shape(shape: tuple[int, ...]) -> str:
    """A shape as messages show it: ``(4096, 8192)``, ``(4096)``, ``()``."""
    return "(" + ", ".join(map(str, shape)) + ")"


def check_name(name: str, path: Path) -> None:
    """Check that a tensor's name can be written into a header and shown in a message.

    Raises:
        CheckpointError: if it cannot.

    """
    if not name.isprintable() or len(name) > MAX_NAME:
        raise CheckpointError(
            f"{path} has a tensor of the name {printable(name)}, which is too long or holds "
            "characters that cannot be shown; rename it where the file was made."
        )


def check_sizes(values: object) -> tuple[int, ...]:
    """Check that sizes, strides or offsets from a file are possible ones; return them.

    Raises:
        TypeError: if they are not a short tuple.
        ValueError: if they are not whole numbers from 0 to below ``MAX_SIZE``.

    """
    if not isinstance(values, tuple) or len(values) > MAX_AXES:
        raise TypeError("sizes are a short tuple")
    if not all(type(value) is int and 0 <= value < MAX_SIZE for value in values):
        raise ValueError("sizes are non-negative 64-bit numbers")
    return values
