"""The config of the draft's decoder layer, derived from a research checkpoint's config.json."""

import math
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
"""Required keys, which have no sensible default."""

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
"""Key that is carried over as it is → the reference's default (EAGLE, configs.py)."""

READ = {"head_dim", "rope_parameters", "rope_scaling", "rope_theta"}
"""Keys that are interpreted, not copied."""

HANDLED_ELSEWHERE = {
    "architectures": "the draft's own are written",
    "bias": "a hint: the tensors decide",
    "qkv_bias": "a hint: the tensors decide",
    "attention_bias": "a hint: the tensors decide",
    "mlp_bias": "a hint: the tensors decide",
    "dtype": "that of the tensors is written",
    "torch_dtype": "that of the tensors is written",
    "model_type": "the tensors decide",
    "num_hidden_layers": "the tensors decide",
    "tie_word_embeddings": "the head is always the verifier's",
}

LAYER_OF_FEATURES: dict[bool, dict[str, Any]] = {
    False: {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    True: {"model_type": "qwen2", "use_sliding_window": False},
}
"""Whether q, k and v have biases → the transformers layer that computes what the draft does."""

REFERENCE_ROPE_BASE = 10000.0

SCALING_PARAMETERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
}
"""Supported type of RoPE scaling → the numbers that it needs."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""The supported activations, by transformers' names; the reference has only silu."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The layer's config, and what the log should say about it."""

    config: LayerConfig
    odd: list[str] = field(default_factory=list)
    """Where the config disagrees with the tensors or the reference."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Key of the source's config → why it is left out."""


def plan_layer(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], features: frozenset[str]
) -> LayerPlan:
    """Derive the config of the draft's layer.

    Args:
        checkpoint: the source, of which the config is read.
        tensors: the checkpoint's tensors, by their names in the format.
        features: the features that the tensors show.

    Raises:
        ConversionError: if the config lacks a size, or has a value that is not supported or does
            not fit the tensors.

    """
    source, where = checkpoint.config, checkpoint.config_file
    missing = [key for key in SIZES if source.get(key) is None]
    if missing:
        raise ConversionError(f"{where} lacks {', '.join(missing)}; add what the draft has.")

    odd: list[str] = []
    values: dict[str, Any] = {key: source[key] for key in SIZES}
    values |= {key: source.get(key, default) for key, default in CARRIED_OVER.items()}
    values |= LAYER_OF_FEATURES["attention_bias" in features]
    values |= _rope(source, str(where), odd)
    for key in ("pad_token_id", "bos_token_id"):
        if isinstance(values[key], list):
            odd.append(f"{key} is the list {values[key]}; the layer's config takes its first")
            values[key] = next(iter(values[key]), None)
    if values["hidden_act"] not in ACTIVATIONS:
        raise ConversionError(
            f"{where}, key hidden_act: {values['hidden_act']!r} is not known; "
            f"one of {', '.join(ACTIVATIONS)} is expected."
        )
    try:
        config = LayerConfig.model_validate(values)
    except PydanticValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConversionError(f"{where}, key {key}: {first['msg']}.") from error
    config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConversionError(
            f"{where}: {config.num_attention_heads} attention heads cannot share "
            f"{config.num_key_value_heads} key-value heads evenly; correct the config."
        )
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


def _rope(source: Mapping[str, Any], where: str, odd: list[str]) -> dict[str, Any]:
    """RoPE's base and scaling, as the reference computes them (EAGLE, cnets1.py, `_init_rope`).

    The reference passes ``rope_theta`` on only if there is no scaling.
    """
    key = "rope_parameters" if source.get("rope_parameters") else "rope_scaling"
    found = source.get(key) or {}
    if not isinstance(found, dict):
        raise ConversionError(f"{where}, key {key}: {found!r} is no JSON object.")
    parameters = dict(found)
    bases = (parameters.pop("rope_theta", None), source.get("rope_theta"))
    theta = next((base for base in bases if base is not None), REFERENCE_ROPE_BASE)
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in SCALING_PARAMETERS:
        raise ConversionError(
            f"{where}, key {key}: the type {kind!r} is not known; "
            f"one of {', '.join(SCALING_PARAMETERS)} is expected."
        )
    for name in SCALING_PARAMETERS[kind]:
        value = parameters.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConversionError(
                f"{where}, key {key}: the type {kind} needs {name}, a number over 0; "
                f"found {value!r}."
            )
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
    """The head size, from q_proj, since the reference and published configs disagree on it."""
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
    if head_dim % 2:
        raise ConversionError(
            f"{query.file}: {query.name} has heads of size {head_dim} by the "
            f"{config.num_attention_heads} heads of {checkpoint.config_file}, and RoPE needs an "
            "even size; give the config that belongs to the tensors."
        )
    return head_dim


def _contradicted_hints(source: Mapping[str, Any], features: frozenset[str]) -> list[str]:
    hints = {"bias": "fusion_bias", "qkv_bias": "attention_bias"}
    return [
        f"the config says {key}: {str(source[key]).lower()}, the tensors say "
        f"{str(feature in features).lower()}"
        for key, feature in hints.items()
        if key in source and bool(source[key]) != (feature in features)
    ]
