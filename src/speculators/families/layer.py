"""The config of a draft's decoder layers, derived from a research checkpoint's config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError as PydanticValidationError

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import ConversionError
from speculators.families.family import Source
from speculators.format.config import LayerConfig
from speculators.format.problems import first_problem

__all__ = ["REFERENCE_ROPE_BASE", "DerivedLayer", "derive_layer"]

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
}

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
class DerivedLayer:
    """The layers' config, and what the log should say about it."""

    config: LayerConfig
    discrepancies: list[str] = field(default_factory=list)
    """Where the config disagrees with the tensors or the reference."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Key of the source's config → why it is left out."""


def derive_layer(
    source: Source,
    config_class: type[LayerConfig],
    fixed: Mapping[str, Any],
    hints: Mapping[str, str],
    left_out: Mapping[str, str],
) -> DerivedLayer:
    """Derive the config of a draft's decoder layers.

    Args:
        source: the checkpoint.
        config_class: of the family's layers.
        fixed: keys that do not come from the source's config, with their values.
        hints: key of the source's config → the feature whose presence it claims.
        left_out: key of the source's config that the family does not take over → why.

    Raises:
        ConversionError: if the config lacks a size, or has a value that is not supported or does
            not fit the tensors.

    """
    given, where = source.checkpoint.config, source.checkpoint.config_file
    missing = [key for key in SIZES if given.get(key) is None]
    if missing:
        raise ConversionError(f"{where} lacks {', '.join(missing)}; add what the draft has.")

    discrepancies: list[str] = []
    values: dict[str, Any] = {key: given[key] for key in SIZES}
    values |= {key: given.get(key, default) for key, default in CARRIED_OVER.items()}
    values |= fixed
    values |= _rope(given, str(where))
    for key in ("pad_token_id", "bos_token_id"):
        if isinstance(values[key], list):
            discrepancies.append(
                f"{key} is the list {values[key]}; the layer's config takes its first"
            )
            values[key] = next(iter(values[key]), None)
    if values["hidden_act"] not in ACTIVATIONS:
        raise ConversionError(
            f"{where}, key hidden_act: {values['hidden_act']!r} is not known; "
            f"one of {', '.join(ACTIVATIONS)} is expected."
        )
    try:
        config = config_class.model_validate(values)
    except PydanticValidationError as error:
        raise ConversionError(f"{where}, {first_problem(error)}.") from error
    config.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConversionError(
            f"{where}: {config.num_attention_heads} attention heads cannot share "
            f"{config.num_key_value_heads} key-value heads evenly; correct the config."
        )
    config.head_dim = _head_dim(config, source, discrepancies)

    discrepancies += _contradicted_hints(given, hints, source.features)
    if given.get("num_hidden_layers", config.num_hidden_layers) != config.num_hidden_layers:
        discrepancies.append(
            f"the config says num_hidden_layers {given['num_hidden_layers']}, "
            f"the tensors are those of {config.num_hidden_layers}"
        )
    reasons = HANDLED_ELSEWHERE | dict(left_out)
    return DerivedLayer(
        config,
        discrepancies,
        {
            key: reasons.get(key, "the layer does not use it")
            for key in given
            if key not in values.keys() | READ or key in reasons
        },
    )


def _rope(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """RoPE's base and scaling, in either spelling."""
    key = "rope_parameters" if given.get("rope_parameters") else "rope_scaling"
    found = given.get(key) or {}
    if not isinstance(found, dict):
        raise ConversionError(f"{where}, key {key}: {found!r} is not a JSON object.")
    parameters = dict(found)
    bases = (parameters.pop("rope_theta", None), given.get("rope_theta"))
    theta = next((base for base in bases if base is not None), REFERENCE_ROPE_BASE)
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(rope_type, str) or rope_type not in SCALING_PARAMETERS:
        raise ConversionError(
            f"{where}, key {key}: the type {rope_type!r} is not known; "
            f"one of {', '.join(SCALING_PARAMETERS)} is expected."
        )
    for name in SCALING_PARAMETERS[rope_type]:
        value = parameters.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConversionError(
                f"{where}, key {key}: the type {rope_type} needs {name}, a number over 0; "
                f"found {value!r}."
            )
    return {"rope_theta": theta, "rope_scaling": {"rope_type": rope_type, **parameters}}


def _head_dim(config: LayerConfig, source: Source, discrepancies: list[str]) -> int:
    """The head size, from q_proj, since the reference and published configs disagree on it."""
    query = source.tensors["layers.0.self_attn.q_proj.weight"]
    config_file = source.checkpoint.config_file
    if len(query.shape) != 2 or query.shape[0] % config.num_attention_heads:
        raise ConversionError(
            f"{query.file}: {query.name} has the shape {describe_shape(query.shape)}, whose rows "
            f"do not divide into the {config.num_attention_heads} heads of "
            f"{config_file}; give the config that belongs to the tensors."
        )
    head_dim = query.shape[0] // config.num_attention_heads
    hinted = (
        source.checkpoint.config.get("head_dim") or config.hidden_size // config.num_attention_heads
    )
    if head_dim != hinted:
        discrepancies.append(f"the config implies head_dim {hinted}, the tensors have {head_dim}")
    if head_dim % 2:
        raise ConversionError(
            f"{query.file}: {query.name} has heads of size {head_dim} by the "
            f"{config.num_attention_heads} heads of {config_file}, and RoPE needs an "
            "even size; give the config that belongs to the tensors."
        )
    return head_dim


def _contradicted_hints(
    given: Mapping[str, Any], hints: Mapping[str, str], features: frozenset[str]
) -> list[str]:
    return [
        f"the config says {key}: {str(given[key]).lower()}, the tensors say "
        f"{str(feature in features).lower()}"
        for key, feature in hints.items()
        if key in given and bool(given[key]) != (feature in features)
    ]
