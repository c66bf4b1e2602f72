"""A converted draft's config.json as vLLM's config of a draft."""

from typing import Any

from speculators.errors import FormatError
from speculators.families.converted import parse_config
from speculators.families.eagle import TENSORS, EagleConfig
from speculators.format.tensors import required_tensors
from speculators.integrations.vllm.models import ARCHITECTURE

__all__ = ["cover_positions", "update_eagle"]

WHERE = "the draft"


def update_eagle(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Fill in the config that vLLM builds the draft's model from.

    It has the keys of a Llama config that vLLM's Llama layer reads, and the further ones that
    ``draft.EagleDraft`` reads.

    Args:
        config_dict: the config.json.
        pre_trained_config: what vLLM derived from it; replaced in place.

    Raises:
        FormatError: if it breaks the format's rules, or needs what vLLM cannot compute.

    """
    _, config = parse_config(config_dict, WHERE)
    assert isinstance(config, EagleConfig)
    layer = config.transformer_layer_config
    if layer.hidden_act != "silu":
        raise FormatError(
            f"The draft's activation is {layer.hidden_act}, but vLLM's Llama layer has only silu; "
            "this draft cannot be served with vLLM."
        )
    sizes = config.sizes
    heads = layer.num_attention_heads
    values = layer.model_dump(exclude={"model_type", "rope_theta", "rope_scaling"})
    values |= {
        "architectures": [ARCHITECTURE],
        "num_key_value_heads": layer.num_key_value_heads or heads,
        "head_dim": layer.head_dim or layer.hidden_size // heads,
        "rope_parameters": {
            **(layer.rope_scaling or {}),
            "rope_type": layer.rope_type,
            "rope_theta": layer.rope_theta,
        },
        # In vLLM's layer the first key adds biases to q, k, v and o, the second to q, k and v.
        "attention_bias": False,
        "qkv_bias": "attention_bias" in config.features,
        "fusion_bias": config.fusion_bias,
        "layernorms": config.layernorms,
        "tensor_shapes": {
            name: spec.shape(sizes)
            for name, spec in required_tensors(TENSORS, config.features | {"embedding"}).items()
        },
    }
    pre_trained_config.clear()
    pre_trained_config.update(values)


def cover_positions(config: Any, max_model_len: int) -> None:
    """Let the draft's table of rotary embeddings cover all positions that vLLM serves.

    vLLM makes it ``max_position_embeddings`` rows long, and in none of the format's types of RoPE
    does it compute the angles from that number. From 0.27 on it extends drafts' tables itself;
    before, a draft reads beyond the end of its table in a longer sequence.

    Args:
        config: the draft's config in vLLM; changed in place.
        max_model_len: of the verifier, in tokens.

    """
    config.max_position_embeddings = max(config.max_position_embeddings, max_model_len)
