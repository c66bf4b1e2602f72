"""Stored tensors, known without reading their data, and tensors to be written from them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from speculators.checkpoint.identity import FileIdentity
from speculators.errors import CheckpointError, did_you_mean, printable

__all__ = [
    "DTYPE_BITS",
    "FLOATS",
    "MAX_SIZE",
    "Constant",
    "FloatType",
    "PlannedTensor",
    "TensorInfo",
    "check_name",
    "check_sizes",
    "describe_shape",
    "float_name",
    "stored_float",
]

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
class FloatType:
    """A floating-point dtype: torch's name for it, and its largest finite number."""

    name: str
    largest: float


FLOATS = {
    "F32": FloatType("float32", float.fromhex("0x1.fffffep+127")),
    "F16": FloatType("float16", 65504.0),
    "BF16": FloatType("bfloat16", float.fromhex("0x1.fep+127")),
}
"""The dtypes that weights may have, by their names in the safetensors format."""


def float_name(dtype: str | None) -> str | None:
    """Torch's name of a key of ``FLOATS``; ``None`` stays ``None``."""
    return None if dtype is None else FLOATS[dtype].name


SHORT = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""What people also call these dtypes."""


def stored_float(name: str) -> str:
    """The key of ``FLOATS`` that a user means, by torch's name for it or a short one.

    Raises:
        ValueError: if there is none; the message is a clause.

    """
    named = {known.name: stored for stored, known in FLOATS.items()} | SHORT
    if name not in named:
        raise ValueError(
            f"{name} is not known; choose one of {', '.join(named)}{did_you_mean(name, named)}"
        )
    return named[name]


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
        rows: which rows of the stored tensor these are, the first and the one after the last;
            ``None`` for the whole tensor.
        identity: what ``file`` was when its header was read; a file that changed since is refused.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None
    identity: FileIdentity | None = None

    @property
    def elements(self) -> int:
        """How many elements the tensor has (1 for a scalar, 0 for an empty one)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes, as a contiguous tensor."""
        return self.elements * DTYPE_BITS[self.dtype] // 8

    @property
    def label(self) -> str:
        """What messages and records call it: its name, with its rows if it is a slice."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    def slice(self, start: int, stop: int) -> "TensorInfo":
        """Rows ``start`` to ``stop`` (exclusive) of a tensor with at least one axis."""
        assert 0 <= start <= stop <= self.shape[0], (self.label, start, stop)
        row = self.strides[0] if self.strides else math.prod(self.shape[1:])
        first = self.rows[0] if self.rows else 0
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row * DTYPE_BITS[self.dtype] // 8,
            rows=(first + start, first + stop),
        )


@dataclass(frozen=True, slots=True)
class Constant:
    """Values that come from no tensor of the source as they are.

    Attributes:
        label: what messages and records call them, such as ``zeros``.
        dtype: a key of ``DTYPE_BITS``.
        data: the values, little-endian and contiguous.

    """

    label: str
    dtype: str
    data: bytes

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written: pieces, one after another along the first axis.

    Attributes:
        dtype: the dtype to write, a key of ``DTYPE_BITS``. A piece of another dtype is rounded;
            both must then be keys of ``FLOATS``.
        shape: the shape to write.
        pieces: tensors of a source, or slices of them, and constants.

    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[TensorInfo | Constant, ...]

    @classmethod
    def copy_of(cls, info: TensorInfo, dtype: str | None = None) -> "PlannedTensor":
        """A whole tensor, rounded to ``dtype`` if given."""
        return cls(dtype or info.dtype, info.shape, (info,))

    def slice(self, start: int, stop: int) -> "PlannedTensor":
        """Rows ``start`` to ``stop`` (exclusive) of a matrix, which has no constants."""
        pieces, first = [], 0
        for piece in self.sources:
            last = first + piece.shape[0]
            if first < stop and start < last:
                pieces.append(piece.slice(max(start, first) - first, min(stop, last) - first))
            first = last
        assert 0 <= start <= stop <= first == self.shape[0], (self.label, start, stop)
        return replace(self, shape=(stop - start, *self.shape[1:]), pieces=tuple(pieces))

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        """The pieces that come from tensors of the source."""
        return tuple(piece for piece in self.pieces if isinstance(piece, TensorInfo))

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size as written, in bytes."""
        return self.elements * DTYPE_BITS[self.dtype] // 8

    @property
    def label(self) -> str:
        """What it is made of, as messages and records say it."""
        return " + ".join(piece.label for piece in self.pieces)


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
