"""Rounding of floating-point numbers to another dtype, without torch.

Everything goes through float32, which holds every number of the other dtypes. From there, numbers
are rounded to nearest, ties to even (IEEE 754-2019, section 4.3.1), as torch does. NaN stays NaN.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

__all__ = ["as_float32", "round_to"]


def round_to(target: str, source: str, data: bytes) -> bytes:
    """Round numbers to another dtype.

    Args:
        target: the dtype to round to, a key of ``tensor.FLOATS``.
        source: the dtype of ``data``, likewise.
        data: the numbers, little-endian and contiguous.

    Raises:
        OverflowError: if a finite number would become infinite; its argument is that number.

    """
    import numpy as np

    values = _READ[source](data)
    rounded = _ROUND[target](values)
    overflown = np.isinf(_READ[target](rounded)) & np.isfinite(values)
    if overflown.any():
        raise OverflowError(float(np.abs(values[overflown]).max()))
    return rounded


def as_float32(dtype: str, data: bytes) -> "Values":
    """Numbers as float32, which holds those of all dtypes.

    Args:
        dtype: a key of ``tensor.FLOATS``.
        data: the numbers, little-endian and contiguous.

    """
    return _READ[dtype](data)


def _read_float32(data: bytes) -> "Values":
    import numpy as np

    return np.frombuffer(data, "<f4")


def _read_float16(data: bytes) -> "Values":
    import numpy as np

    return np.frombuffer(data, "<f2").astype("<f4")


def _read_bfloat16(data: bytes) -> "Values":
    """A bfloat16 is the upper half of a float32."""
    import numpy as np

    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def _round_to_float16(values: "Values") -> bytes:
    import numpy as np

    with np.errstate(all="ignore"):  # overflow is detected afterwards
        return values.astype("<f2").tobytes()


def _round_to_bfloat16(values: "Values") -> bytes:
    """Round each float32 to its upper 16 bits.

    Adding just under half a unit of the last kept bit carries into that bit if the dropped part is
    over half a unit. Adding the last kept bit, too, makes exactly half a unit carry if that bit is
    odd: ties go to even.
    """
    import numpy as np

    bits = values.view("<u4")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40  # a NaN's payload may be in the dropped half alone
    return np.where(np.isnan(values), quiet, rounded).astype("<u2").tobytes()


_READ: dict[str, Callable[[bytes], "Values"]] = {
    "F32": _read_float32,
    "F16": _read_float16,
    "BF16": _read_bfloat16,
}
_ROUND: dict[str, Callable[["Values"], bytes]] = {
    "F32": lambda values: values.tobytes(),
    "F16": _round_to_float16,
    "BF16": _round_to_bfloat16,
}
