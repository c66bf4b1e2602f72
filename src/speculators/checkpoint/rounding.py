"""Floating-point numbers of one type as another, without torch.

Everything goes through float32, which holds every number of the other types. From there, each
number becomes the nearest one of the new type, and of two equally near ones that with an even
last bit (IEEE 754-2019, section 4.3.1), as in torch. NaN stays NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]

__all__ = ["FLOATS", "FloatType", "round_to"]


@dataclass(frozen=True, slots=True)
class FloatType:
    """A type of floating-point numbers: what people call it, and its largest finite number."""

    name: str
    largest: float


FLOATS = {
    "F32": FloatType("float32", float.fromhex("0x1.fffffep+127")),
    "F16": FloatType("float16", 65504.0),
    "BF16": FloatType("bfloat16", float.fromhex("0x1.fep+127")),
}
"""By their names in the safetensors format."""


def round_to(target: str, source: str, data: bytes) -> bytes:
    """Round numbers to another type.

    Args:
        target: what they become, a key of ``FLOATS``.
        source: what they are, likewise.
        data: the numbers, little-endian, one after the other.

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

    with np.errstate(all="ignore"):  # what overflows is found afterwards
        return values.astype("<f2").tobytes()


def _round_to_bfloat16(values: "Values") -> bytes:
    """Round the lower half of each float32 into the upper one.

    Adding just under half of the last bit that is kept carries into it if the rest is over half;
    adding that bit itself too makes the carry happen at exactly half where the bit is odd.
    """
    import numpy as np

    bits = values.view("<u4")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40  # a NaN's payload may lie in the lower half alone
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
