"""What SafeAILab's code cannot compute of a draft's layers, EAGLE-1's and EAGLE-3's alike.

By ``eagle/model/cnets1.py`` and ``cnets.py`` (``_init_rope``, ``LlamaAttention.__init__``).
"""

from typing import Any

from speculators.families.research.layer import REFERENCE_ROPE_BASE
from speculators.families.target import limit

__all__ = ["newer_rope", "own_head_size"]


@limit("a size of heads of its own")
def own_head_size(config: Any) -> str | None:
    """Heads that are not the hidden size over their number."""
    layer = config.transformer_layer_config
    usual = layer.hidden_size == (layer.head_dim or 0) * layer.num_attention_heads
    return None if usual else f"has heads of size {layer.head_dim}"


@limit("RoPE scaling, except linear and dynamic with the base 10000")
def newer_rope(config: Any) -> str | None:
    """RoPE scaling of other types, or with another base: it passes none on beside scaling."""
    layer = config.transformer_layer_config
    if layer.rope_type == "default" or (
        layer.rope_type in {"linear", "dynamic"} and layer.rope_theta == REFERENCE_ROPE_BASE
    ):
        return None
    return f"has {layer.rope_type} RoPE scaling with the base {layer.rope_theta:g}"
