"""Whether two stored tensors hold the same numbers, and if not, by how much they differ.

Both are read in pieces, so memory does not grow with them. numpy alone computes, and only where
bytes differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from speculators.checkpoint.output.rounding import as_float32, round_to
from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import DTYPE_BITS, FLOATS, Constant, PlannedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Numbers", "compare_numbers", "largest_value"]

ELEMENTS = 1 << 20
"""How many are compared at a time."""

INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}

Result = Literal["same", "same values", "rounded", "different"]


@dataclass(slots=True)
class Numbers:
    """How two tensors of one shape compare.

    Attributes:
        result: ``same`` bytes of one dtype; the ``same values`` in two dtypes, or as 0 and -0;
            ``rounded``, one is the other rounded to its dtype; or ``different``.
        differing: how many elements differ.
        largest: the largest difference; infinite where only one is not a number.
        of: the largest value, to judge it by.

    """

    result: Result
    differing: int = 0
    largest: float = 0.0
    of: float = 0.0


def compare_numbers(one: PlannedTensor, other: PlannedTensor) -> Numbers:
    """Compare two tensors of the same shape.

    Raises:
        CheckpointError: if a file cannot be read, or is not the one whose header was read.

    """
    same_type = one.dtype == other.dtype
    if same_type and all(a == b for a, b in _pairs(one, other)):
        return Numbers("same")
    if not _is_number(one) or not _is_number(other):
        return Numbers("different", one.elements, float("inf"))
    return _compare_values(one, other)


def largest_value(tensor: PlannedTensor) -> float | None:
    """The largest absolute value of a tensor; ``None`` if one is not a number, or of another kind.

    Raises:
        CheckpointError: if its file cannot be read, or is not the one whose header was read.

    """
    if not _is_number(tensor):
        return None
    import numpy as np

    largest = max((float(np.abs(_values(tensor, it)).max()) for it in _pieces(tensor)), default=0.0)
    return largest if np.isfinite(largest) else None


def _compare_values(one: PlannedTensor, other: PlannedTensor) -> Numbers:
    import numpy as np

    found = Numbers("different")
    rounds = dict.fromkeys((0, 1), one.dtype != other.dtype)
    for pieces in _pairs(one, other):
        a, b = (_values(it, piece) for it, piece in zip((one, other), pieces, strict=True))
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(a - b)
        differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
        apart = np.where(np.isnan(apart) & differs, np.inf, np.where(differs, apart, 0))
        found.differing += int(differs.sum())
        found.largest = max(found.largest, float(apart.max(initial=0)))
        finite = [np.abs(it[np.isfinite(it)]).max(initial=0) for it in (a, b)]
        found.of = max(found.of, *map(float, finite))
        for it, (exact, rounded) in enumerate([(0, 1), (1, 0)]):
            tensors = (one, other)
            rounds[it] = rounds[it] and (
                _rounded(tensors[exact], pieces[exact], tensors[rounded]) == pieces[rounded]
            )
    if not found.differing:
        found.result = "same values"
    elif any(rounds.values()):
        found.result = "rounded"
    return found


def _is_number(tensor: PlannedTensor) -> bool:
    return tensor.dtype in FLOATS or tensor.dtype in INTEGERS


def _values(tensor: PlannedTensor, data: bytes) -> "NDArray[Any]":
    """Elements as float64, which holds those of all floats; of integers up to 2**53."""
    import numpy as np

    if tensor.dtype in FLOATS:
        return as_float32(tensor.dtype, data).astype("<f8")
    return np.frombuffer(data, INTEGERS[tensor.dtype]).astype("<f8")


def _rounded(tensor: PlannedTensor, data: bytes, to: PlannedTensor) -> bytes | None:
    if tensor.dtype not in FLOATS or to.dtype not in FLOATS:
        return None
    try:
        return round_to(to.dtype, tensor.dtype, data)
    except OverflowError:
        return None


def _pairs(one: PlannedTensor, other: PlannedTensor) -> Iterator[tuple[bytes, bytes]]:
    """The same elements of both, some at a time."""
    return zip(_pieces(one), _pieces(other), strict=True)


def _pieces(tensor: PlannedTensor) -> Iterator[bytes]:
    """A tensor's bytes in pieces of ``ELEMENTS``; the last one may be shorter."""
    size = ELEMENTS * DTYPE_BITS[tensor.dtype] // 8
    waiting = bytearray()
    for piece in tensor.pieces:
        for chunk in [piece.data] if isinstance(piece, Constant) else contiguous_chunks(piece):
            waiting += chunk
            while len(waiting) >= size:
                yield bytes(waiting[:size])
                del waiting[:size]
    if waiting:
        yield bytes(waiting)
