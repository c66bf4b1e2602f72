"""From a research checkpoint's config.json to the config of the draft's decoder layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError as PydanticValidationError

from speculators.checkpoint.reader import Checkpoint
from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.errors import ConversionError
from speculators.format.config import LayerConfig

__all__ = ["LayerPlan", "plan_layer"]

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""What no default can stand in for."""

CARRIED_OVER: dict[str, Any] = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What reaches the layer as it stands, with the reference's default (EAGLE, configs.py)."""

READ = {"head_dim", "rope_parameters", "rope_scaling", "rope_theta"}
"""What reaches the layer after a closer look."""

HANDLED_ELSEWHERE = {
    "architectures": "the draft's own are written",
    "bias": "a hint: the tensors decide",
    "qkv_bias": "a hint: the tensors decide",
    "attention_bias": "a hint: the tensors decide",
    "mlp_bias": "a hint: the tensors decide",
    "dtype": "the tensors' own is kept",
    "torch_dtype": "the tensors' own is kept",
    "model_type": "the tensors decide",
    "num_hidden_layers": "the tensors decide",
    "tie_word_embeddings": "the head is always the verifier's",
}

LAYER_OF_FEATURES: dict[bool, dict[str, Any]] = {
    False: {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    True: {"model_type": "qwen2", "use_sliding_window": False},
}
"""The transformers layer that computes what the draft does, by whether q, k and v have biases."""

REFERENCE_ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The layer's config, and what a reader of the log should know about it."""

    config: LayerConfig
    odd: list[str] = field(default_factory=list)
    """Where the config says one thing and the tensors, or the reference, another."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Keys of the source config that do not reach the layer, and why."""


def plan_layer(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], features: frozenset[str]
) -> LayerPlan:
    """Derive the config of the draft's layer.

    Args:
        checkpoint: for its config, and the name of its file in messages.
        tensors: the checkpoint's tensors by the names of the format.
        features: what the tensors show.

    Raises:
        ConversionError: if sizes are missing or make no sense.

    """
    source, where = checkpoint.config, checkpoint.config_file
    missing = [key for key in SIZES if source.get(key) is None]
    if missing:
        raise ConversionError(f"{where} lacks {', '.join(missing)}; add what the draft has.")

    odd: list[str] = []
    values: dict[str, Any] = {key: source[key] for key in SIZES}
    values |= {key: source.get(key, default) for key, default in CARRIED_OVER.items()}
    values |= LAYER_OF_FEATURES["attention_bias" in features]
    values |= _rope(source, odd)
    try:
        config = LayerConfig.model_validate(values)
    except PydanticValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConversionError(f"{where}, key {key}: {first['msg']}.") from error
    config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
    config.head_dim = _head_dim(config, tensors, checkpoint, odd)

    odd += _contradicted_hints(source, features)
    if source.get("num_hidden_layers", 1) != 1:
        odd.append(
            f"the config says num_hidden_layers {source['num_hidden_layers']}, "
            "the tensors are those of 1"
        )
    left_out = {
        key: HANDLED_ELSEWHERE.get(key, "the layer does not use it")
        for key in source
        if key not in values.keys() | READ or key in HANDLED_ELSEWHERE
    }
    return LayerPlan(config, odd, left_out)


def _rope(source: Mapping[str, Any], odd: list[str]) -> dict[str, Any]:
    """RoPE's base and scaling, as the reference computes them (EAGLE, cnets1.py, `_init_rope`).

    The reference passes ``rope_theta`` on only where there is no scaling.
    """
    parameters = dict(source.get("rope_parameters") or source.get("rope_scaling") or {})
    theta = float(
        parameters.pop("rope_theta", None) or source.get("rope_theta") or REFERENCE_ROPE_BASE
    )
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind in {"linear", "dynamic"} and theta != REFERENCE_ROPE_BASE:
        odd.append(
            f"rope_theta {theta:g} is not used: with {kind} scaling the reference, and so the "
            f"training, used {REFERENCE_ROPE_BASE:g}"
        )
        theta = REFERENCE_ROPE_BASE
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **parameters}}


def _head_dim(
    config: LayerConfig,
    tensors: Mapping[str, TensorInfo],
    checkpoint: Checkpoint,
    odd: list[str],
) -> int:
    """The size of a head: from q_proj, since the reference and published configs disagree on it."""
    query = tensors["layers.0.self_attn.q_proj.weight"]
    if len(query.shape) != 2 or query.shape[0] % config.num_attention_heads:
        raise ConversionError(
            f"{query.file}: {query.name} has the shape {describe_shape(query.shape)}, whose rows "
            f"do not divide into the {config.num_attention_heads} heads of "
            f"{checkpoint.config_file}; give the config that belongs to the tensors."
        )
    head_dim = query.shape[0] // config.num_attention_heads
    hinted = checkpoint.config.get("head_dim") or config.hidden_size // config.num_attention_heads
    if head_dim != hinted:
        odd.append(f"the config implies head_dim {hinted}, the tensors have {head_dim}")
    return head_dim


def _contradicted_hints(source: Mapping[str, Any], features: frozenset[str]) -> list[str]:
    hints = {"bias": "fusion_bias", "qkv_bias": "attention_bias"}
    return [
        f"the config says {key}: {str(source[key]).lower()}, the tensors say "
        f"{str(feature in features).lower()}"
        for key, feature in hints.items()
        if key in source and bool(source[key]) != (feature in features)
    ]
