"""Tables of RoPE that a checkpoint stores: evidence of the RoPE that the draft was trained with.

They are left out, since they follow from the config. That they do is checked here, with the values.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.errors import ConversionError
from speculators.format.config import LayerConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

__all__ = ["check_rope_table"]

MOST_ROWS = 1024
"""Rows of a table that are compared; a wrong frequency shows in the first ones."""

MOST_BYTES = 64 << 20

TOLERANCES = {"F64": 2e-3, "F32": 2e-3, "C64": 2e-3, "F16": 1e-2, "BF16": 2e-2}
"""Dtype → how far values may be off: it covers rounding, also that of the angles."""


def check_rope_table(info: TensorInfo, config: LayerConfig, config_file: str) -> str | None:
    """Check that a stored table has the values that a config gives.

    Args:
        info: the table: frequencies, or cosines or sines of the angles, a row for each position.
        config: of the layer, complete.
        config_file: for the message.

    Returns:
        Why it cannot be checked, as a clause; ``None`` if it was.

    Raises:
        ConversionError: if it has other values.
        CheckpointError: if its file ends before it does.

    """
    scaling = (config.rope_scaling or {}).get("rope_type")
    if scaling not in {None, "linear", "dynamic", "llama3"}:
        return f"RoPE of the type {scaling} is not computed for it"
    if info.dtype not in TOLERANCES:
        return f"its type is {info.dtype}"
    rows = [size for size in info.shape[:-1] if size != 1]
    if not info.shape or len(rows) > 1:
        return f"its shape is {describe_shape(info.shape)}"
    length = rows[0] if rows else 1
    table = replace(info, shape=(length, info.shape[-1]))
    if info.strides is None:
        table = table.slice(0, min(length, MOST_ROWS))
    elif info.nbytes > MOST_BYTES:
        return "it is too large"
    else:
        table = info
    values = _read(table).reshape(min(length, MOST_ROWS) if info.strides is None else length, -1)
    values = values[:MOST_ROWS]
    import numpy as np

    tolerance = TOLERANCES[info.dtype]
    single = info.dtype in {"F32", "F64", "C64"}
    for expected, are_angles in _expected(config, len(values)):
        if expected.shape == values.shape and np.allclose(
            values,
            expected,
            rtol=0 if are_angles else (1e-4 if single else tolerance),
            atol=tolerance if are_angles else (0 if single else 1e-6),
        ):
            return None
    base = _base_of(values)
    scaled = f" with {scaling} scaling" if scaling else ""
    raise ConversionError(
        f"{info.file}: {info.name} is not what {config_file} gives (RoPE of base "
        f"{config.rope_theta:g} for heads of size {config.head_dim}{scaled})"
        f"{f'; its values are those of base {base:.6g}' if base else ''}: give the config "
        "that the draft was trained with."
    )


def _frequencies(config: LayerConfig) -> "Values":
    """RoPE's frequencies (Su et al. 2021, section 3.4.2), before linear scaling."""
    import numpy as np

    size = config.head_dim or config.hidden_size // config.num_attention_heads
    frequencies: Values = config.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":  # meta-llama/llama-models, ``apply_scaling``
        turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    return frequencies


def _expected(config: LayerConfig, length: int) -> Iterator[tuple["Values", bool]]:
    """The tables that models store, and whether they hold cosines or sines of angles."""
    import numpy as np

    frequencies = _frequencies(config)
    scaling = config.rope_scaling or {}
    linear = scaling["factor"] if scaling.get("rope_type") == "linear" else 1
    # With linear scaling some models divide the frequencies, and some the positions.
    for stored in {1, linear}:
        yield (frequencies / stored)[None], False
        yield np.tile(frequencies / stored, 2)[None], False
    angles = np.outer(np.arange(length), frequencies / linear)
    cos, sin = np.cos(angles), np.sin(angles)
    for values in (cos, sin):
        yield values, True
        yield np.tile(values, 2), True
        yield values.repeat(2, axis=1), True
    yield np.concatenate((cos, sin), 1), True
    yield np.concatenate((sin, cos), 1), True
    yield np.stack((cos, sin), 2).reshape(length, -1), True


def _base_of(values: "Values") -> float | None:
    """The base of unscaled frequencies; ``None`` if they are something else."""
    import numpy as np

    if len(values) != 1 or values.shape[1] < 2 or not 0 < values[0, 1] < 1:
        return None
    base = float(values[0, 1]) ** -values.shape[1]
    fitting = base ** (-np.arange(values.shape[1]) / values.shape[1])
    return base if np.allclose(values[0], fitting, rtol=0.05) else None


def _read(info: TensorInfo) -> "Values":
    """The values of a small tensor; a complex number becomes two."""
    import numpy as np

    data = b"".join(contiguous_chunks(info))
    if info.dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").astype(np.float64)
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<f4"}
    return np.frombuffer(data, types[info.dtype]).astype(np.float64)
