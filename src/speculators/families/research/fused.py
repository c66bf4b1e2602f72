"""Matrices that some trainers and engines store one above the other, as one."""

import re
from collections.abc import Mapping

from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.errors import ConversionError

__all__ = ["split", "unfused"]

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.W_pack": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Module → the modules whose rows it has, in this order (vLLM, SGLang and Phi-3; Baichuan)."""

NAME = re.compile(rf"(?P<before>.*)(?P<module>{'|'.join(map(re.escape, FUSED))})\.(?P<kind>\w+)")


def unfused(name: str) -> tuple[str, ...]:
    """The names of the tensors that one of this name holds: itself, if it is not fused."""
    found = NAME.fullmatch(name)
    if found is None:
        return (name,)
    return tuple(f"{found['before']}{part}.{found['kind']}" for part in FUSED[found["module"]])


def split(
    tensors: Mapping[str, TensorInfo], heads: int | None, kv_heads: int | None
) -> dict[str, TensorInfo]:
    """Replace every fused tensor by its parts, which are slices of it.

    Args:
        tensors: by their names without prefix.
        heads: the number of attention heads that the config gives.
        kv_heads: that of its key-value heads, if it gives one.

    Raises:
        ConversionError: if the rows do not divide into such parts, or a part is there twice.

    """
    whole: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        parts = unfused(name)
        sizes = _sizes(info, len(parts), heads, kv_heads)
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            if part in whole or (part != name and part in tensors):
                raise ConversionError(
                    f"{info.file} has {part} and {info.name}, which holds it, too; remove the one "
                    "that was not trained."
                )
            whole[part] = info if part == name else info.slice(start, start + size)
            start += size
    return whole


def _sizes(
    info: TensorInfo, parts: int, heads: int | None, kv_heads: int | None
) -> tuple[int, ...]:
    """The rows of each part of a tensor."""
    if parts == 1:
        return (0,)
    rows = info.shape[0] if info.shape else 0
    if parts == 2 and rows % 2 == 0 and rows:
        return rows // 2, rows // 2
    if parts == 3 and isinstance(heads, int) and heads > 0:
        shared = kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else heads
        size, rest = divmod(rows, heads + 2 * shared)
        if size and not rest:
            return heads * size, shared * size, shared * size
    given = f", with {heads} attention heads and {kv_heads or heads} key-value heads"
    raise ConversionError(
        f"{info.file}: {info.name} has the shape {describe_shape(info.shape)}, whose rows do not "
        f"divide into its {parts} parts{given if parts == 3 else ''}; give the config that belongs "
        "to the tensors."
    )
