"""RoPE as llama.cpp's converter reads it, of whichever family a draft is.

By ``conversion/base.py`` and ``conversion/llama.py`` of llama.cpp b11434, which were run on exports
of every type of scaling here.
"""

from typing import Any

from speculators.format.config import LayerConfig

__all__ = ["keys_of_rope", "misread_rope"]

UNREAD_OF_YARN = {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "truncate": True}
"""Parameter that it writes, if at all, where llama.cpp does not look → what llama.cpp takes.

``findings/llama-cpp-b11549-ignores-the-betas-of-yarn.sh`` shows it of the newer b11549, too.
"""


def keys_of_rope(layer: LayerConfig) -> dict[str, Any]:
    """The keys that it looks for at the top of config.json, beside those that all readers take."""
    scaling = layer.rope_scaling or {}
    trained = scaling.get("original_max_position_embeddings")
    if trained is None and layer.rope_type == "yarn":
        trained = layer.max_position_embeddings  # as transformers takes it; it is asked for there
    return {"original_max_position_embeddings": trained} if trained else {}


def misread_rope(layer: LayerConfig, *, llama3: bool) -> str | None:
    """What it would drop, or compute otherwise, as it follows the draft's name.

    Args:
        layer: the draft's layers.
        llama3: whether it takes scaling of the type ``llama3``, as it does of Llama's layers only.

    """
    scaling, rope_type = layer.rope_scaling or {}, layer.rope_type
    if rope_type == "dynamic" or (rope_type == "llama3" and not llama3):
        return f"has {rope_type} RoPE scaling"
    if rope_type != "yarn":
        return None
    odd = [
        key
        for key, value in scaling.items()
        if key not in {"rope_type", "type", "factor", "original_max_position_embeddings"}
        and value not in {None, UNREAD_OF_YARN.get(key)}
    ]
    return f"has YaRN RoPE scaling with {odd[0]} {scaling[odd[0]]}" if odd else None
