"""The config of a draft's decoder layers, derived from a research checkpoint's config.json."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError as PydanticValidationError

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import ConversionError, printable
from speculators.families.family import Source
from speculators.families.research.keys import (
    CHANGES,
    HINTS,
    LLAMA_LIKE,
    WITHOUT_EFFECT,
    Key,
    SourceKeys,
    is_neutral,
)
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
}
"""Key that is carried over as it is → the reference's default (EAGLE, configs.py), also where the
config says ``null``."""

TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
"""Likewise, where ``null`` says that there is no such token."""

READ = {"head_dim", "rope_parameters", "rope_scaling", "rope_theta"}
"""Keys that are interpreted, not copied."""

WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size")
"""Keys that limit how far back a token sees."""

ABOUT_WINDOWS = {
    *WINDOWS,
    "layer_types",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
}

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
"""Types of layers: which positions they see."""

QUANTIZATION = ("quantization_config", "compression_config")

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

OTHER_PARAMETERS = {
    "default": ("original_max_position_embeddings",),
    "linear": ("original_max_position_embeddings",),
    "dynamic": ("original_max_position_embeddings",),
    "llama3": (),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Type of RoPE scaling → what else it may have."""

PARAMETERS_THAT_CHANGE = ("alpha", "short_factor", "long_factor", "short_mscale", "long_mscale")
"""Parameters of types that are not supported: they change results, whatever the type says."""

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
    read: Collection[str] = (),
) -> DerivedLayer:
    """Derive the config of a draft's decoder layers.

    Args:
        source: the checkpoint.
        config_class: of the family's layers.
        fixed: keys that do not come from the source's config, with their values.
        hints: key of the source's config → the feature whose presence it claims, beside ``HINTS``.
        left_out: key of the source's config that the family handles itself → why it is left out.
        read: further keys that the family handles itself, and that are not left out.

    Raises:
        ConversionError: if the config lacks a size, or has a value that is not supported or does
            not fit the tensors.

    """
    where = str(source.checkpoint.config_file)
    keys = SourceKeys(source.checkpoint.config, where)
    missing = [name for name in SIZES if keys.get(name) is None]
    if missing:
        raise ConversionError(f"{where} lacks {', '.join(missing)}; add what the draft has.")

    discrepancies: list[str] = []
    values: dict[str, Any] = {name: keys.get(name) for name in SIZES}
    for name, default in CARRIED_OVER.items():
        said = keys.get(name)
        values[name] = default if said is None else said
    values |= {name: keys.get(name, default) for name, default in TOKENS.items()}
    values |= fixed
    rope = _Rope(keys, int(values.get("num_hidden_layers", 1)))
    values |= rope.read()
    for name in ("pad_token_id", "bos_token_id"):
        if isinstance(values[name], list):
            discrepancies.append(
                f"{name} is the list {values[name]}; the layer's config takes its first"
            )
            values[name] = next(iter(values[name]), None)
    if values["hidden_act"] not in ACTIVATIONS:
        found = keys.find("hidden_act")
        raise ConversionError(
            f"{where}, key {found.path if found else 'hidden_act'}: {values['hidden_act']!r} is "
            f"not known; one of {', '.join(ACTIVATIONS)} is expected."
        )
    try:
        config = config_class.model_validate(values)
    except PydanticValidationError as error:
        raise ConversionError(f"{where}, {first_problem(error)}.") from error
    if not config.num_key_value_heads:
        config.num_key_value_heads = _key_value_heads(config, source)
        if config.num_key_value_heads != config.num_attention_heads:
            discrepancies.append(
                "the config gives no num_key_value_heads, the tensors are those of "
                f"{config.num_key_value_heads}"
            )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConversionError(
            f"{where}: {config.num_attention_heads} attention heads cannot share "
            f"{config.num_key_value_heads} key-value heads evenly; correct the config."
        )
    config.head_dim = _head_dim(config, source, keys, discrepancies)

    discrepancies += rope.discrepancies
    _check_window(keys, config, rope.layer_type)
    interpreted = values.keys() | hints.keys()
    discrepancies += _judge_the_rest(keys, rope, config, interpreted, {*left_out, *read})
    discrepancies += _contradicted_hints(keys, HINTS | dict(hints), source.features)
    discrepancies += _contradicted_by_tensors(keys, config)
    discrepancies += keys.discrepancies
    reasons = WITHOUT_EFFECT | dict(left_out) | rope.fates
    written = values.keys() | READ
    return DerivedLayer(
        config,
        discrepancies,
        dict.fromkeys(keys.opened, "its keys are read one by one")
        | {
            key.path: _reason(key, reasons, written)
            for key in keys.all
            if key.path in reasons or key.path not in {*written, *read}
        },
    )


def _reason(key: Key, reasons: Mapping[str, str], written: Collection[str]) -> str:
    """Why a key is left out."""
    for name in (key.path, key.plain, key.name):
        if name in reasons:
            return reasons[name]
    if key.name in written:
        return f"it is written as {key.name}"
    if key.name in CHANGES:
        return "with this value it changes nothing"
    if key.name in ABOUT_WINDOWS:
        return "the layer sees all positions before its own"
    if key.name in QUANTIZATION:
        return "the tensors are not quantized"
    return "its meaning is not known" if not _is_empty(key.value) else "it is empty"


def _is_empty(value: Any) -> bool:
    return value is None or value in ({}, [], "")


def _judge_the_rest(
    keys: SourceKeys,
    rope: "_Rope",
    config: LayerConfig,
    interpreted: Collection[str],
    seen_to: Collection[str],
) -> list[str]:
    """Check the keys that the layer does not compute with; a clause on those that are not known."""
    known = {*interpreted, *seen_to, *READ, *ABOUT_WINDOWS, *WITHOUT_EFFECT, *QUANTIZATION}
    unknown, changing = list[str](), list[str]()
    for key in [*keys.all, *rope.parameters]:
        if key.name in {*CHANGES, *PARAMETERS_THAT_CHANGE} and key.plain not in seen_to:
            of_others = key.name == "rope_local_base_freq" and rope.layer_type == FULL
            if not of_others and not is_neutral(key.value, CHANGES.get(key.name, ()), config):
                changing.append(f"{key.path} {key.shown}")
        elif not _is_empty(key.value) and (
            key.name not in known or (key.name in WINDOWS and not isinstance(key.value, int))
        ):
            unknown.append(key.path)
    if changing:
        raise ConversionError(
            f"{keys.where} has {', '.join(changing)}, with which the draft would compute what the "
            "format cannot express; if the training ignored it, as the reference does, remove it "
            "from the config."
        )
    if not unknown:
        return []
    clause = (
        f"what the config's {', '.join(unknown)} means for the layer is not known; it is left "
        "out, so check that the training did not use it"
    )
    return [clause]


def _check_window(keys: SourceKeys, config: LayerConfig, layer_type: str | None) -> None:
    """Check that no sliding window or chunk limits what the layer sees."""
    if layer_type == FULL:
        return
    model_type, used = str(keys.get("model_type")), keys.get("use_sliding_window")
    full_layers = keys.get("max_window_layers")
    # Qwen's windows are off unless the config turns them on, and then only for later layers.
    off = used is False or (used is None and model_type.startswith(("qwen2", "qwen3")))
    if layer_type is None and isinstance(full_layers, int) and full_layers > 0:
        off = True
    for name in WINDOWS:
        window = keys.find(name)
        if window is None or not isinstance(window.value, int | float) or window.value <= 0:
            continue
        if window.value < config.max_position_embeddings and not (off and "sliding" in name):
            raise ConversionError(
                f"{keys.where}, key {window.path}: the draft's layer may see no further back than "
                f"{window.value} positions, which the format cannot express; if the training did "
                "not limit it, remove the key."
            )


@dataclass(slots=True)
class _Rope:
    """What the source's config says about RoPE.

    Attributes:
        keys: of the config.
        layers: how many the draft has.
        layer_type: of the draft's layers by ``layer_types``, if it says that.
        discrepancies: clauses for the log.
        parameters: RoPE's parameters that are not known to belong to its type.
        fates: path of ``rope_parameters`` → what becomes of it.

    """

    keys: SourceKeys
    layers: int
    layer_type: str | None = None
    discrepancies: list[str] = field(default_factory=list)
    parameters: list[Key] = field(default_factory=list)
    fates: dict[str, str] = field(default_factory=dict)

    def read(self) -> dict[str, Any]:
        """RoPE's base and scaling, in either spelling."""
        self.layer_type = self._layer_type()
        found = [
            it
            for name in ("rope_parameters", "rope_scaling")
            for key in self.keys.named(name)
            if key.value and (it := self._parameters(key)) is not None
        ]
        for path, theta, *scaling in found[1:]:
            first = found[0]
            if scaling != list(first[2:]) or (None not in (theta, first[1]) and theta != first[1]):
                raise ConversionError(
                    f"{self.keys.where} has {first[0]} and {path}, which give another RoPE each; "
                    "remove the one that the draft was not trained with."
                )
        path, inner, rope_type, parameters = next(iter(found), ("", None, "default", {}))
        theta = self._base(path, inner)
        if rope_type == "default":
            return {"rope_theta": theta, "rope_scaling": None}
        for name in SCALING_PARAMETERS[rope_type]:
            value = parameters.get(name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConversionError(
                    f"{self.keys.where}, key {path}: the type {rope_type} needs {name}, a number "
                    f"over 0; found {value!r}."
                )
        return {"rope_theta": theta, "rope_scaling": {"rope_type": rope_type, **parameters}}

    def _layer_type(self) -> str | None:
        """What ``layer_types`` says of all of the draft's layers; ``None`` if it does not."""
        found = self.keys.find("layer_types")
        if found is None or not isinstance(found.value, list) or not found.value:
            return None
        types = [str(it) for it in found.value]
        if len(set(types)) > 1:
            # A list of another length is the verifier's.
            return types[0] if len(types) == self.layers == 1 else None
        if types[0] not in {FULL, SLIDING, CHUNKED}:
            raise ConversionError(
                f"{self.keys.where}, key {found.path}: the type {types[0]!r} is not known; "
                f"the format's layers are of the type {FULL}."
            )
        return types[0]

    def _base(self, path: str, inner: Any) -> Any:
        flat = self.keys.find("rope_theta")
        if flat is None or flat.value is None:
            return REFERENCE_ROPE_BASE if inner is None else inner
        if inner is not None and inner != flat.value:
            raise ConversionError(
                f"{self.keys.where} gives rope_theta {inner!r} in {path} and {flat.value!r} as "
                f"{flat.path}; remove the one that the draft was not trained with."
            )
        return flat.value

    def _parameters(self, key: Key) -> tuple[str, Any, str, dict[str, Any]] | None:
        """The path, base, type and other parameters that a key gives."""
        where = self.keys.where
        if not isinstance(key.value, dict):
            raise ConversionError(f"{where}, key {key.path}: {key.shown} is not a JSON object.")
        path, parameters = key.path, dict(key.value)
        if key.name == "rope_parameters":
            self.fates[path] = "it is written as rope_theta and rope_scaling"
        if any(isinstance(value, dict) for value in parameters.values()):
            chosen = self._of_layer_type(key)
            if chosen is None:
                return None
            path, parameters = chosen
        theta = parameters.pop("rope_theta", None)
        rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
        parameters.pop("type", None)
        known = isinstance(rope_type, str) and rope_type in {"default", *SCALING_PARAMETERS}
        if not known:
            raise ConversionError(
                f"{where}, key {path}: the type {rope_type!r} is not known; "
                f"one of {', '.join(SCALING_PARAMETERS)} is expected."
            )
        usual = SCALING_PARAMETERS.get(rope_type, ()) + OTHER_PARAMETERS[rope_type]
        for name, value in parameters.items():
            if name not in usual:
                shown = printable(name)
                self.parameters.append(Key(f"{path}.{shown}", shown, value))
        return path, theta, rope_type, parameters

    def _of_layer_type(self, key: Key) -> tuple[str, dict[str, Any]] | None:
        """The parameters of the draft's layers, where they are given by the type of a layer."""
        by_type = {name: it for name, it in key.value.items() if isinstance(it, dict)}
        unsaid = {name for name, it in key.value.items() if it is None}
        for name, it in key.value.items():
            others = {str(inner[name]) for inner in by_type.values() if name in inner} - {str(it)}
            if name not in by_type and name not in unsaid and others:
                raise ConversionError(
                    f"{self.keys.where}, key {key.path} gives {printable(name)} {it!r} beside "
                    f"{', '.join(sorted(others))} by the type of a layer; remove what the draft "
                    "was not trained with."
                )
        if not unsaid and len({str(sorted(it.items(), key=str)) for it in by_type.values()}) == 1:
            name, parameters = next(iter(by_type.items()))
            return f"{key.path}.{printable(name)}", dict(parameters)
        if self.layer_type in by_type:
            return f"{key.path}.{self.layer_type}", dict(by_type[self.layer_type])
        flat = self.keys.find("rope_theta")
        if flat is not None and flat.value is not None:
            self.fates[key.path] = f"it is given by the type of a layer; {flat.path} is used"
            self.discrepancies.append(
                f"{key.path} is given by the type of a layer and not used; {flat.path} is"
            )
            return None
        raise ConversionError(
            f"{self.keys.where}, key {key.path} gives RoPE by the type of a layer, and layer_types "
            "does not say of which type the draft's layer is; add rope_theta with the base that "
            "the draft was trained with, or layer_types with its one type."
        )


def _key_value_heads(config: LayerConfig, source: Source) -> int:
    """The number of key-value heads, from k_proj: the reference's is that of the heads."""
    queries, keys = (
        source.tensors[f"layers.0.self_attn.{it}_proj.weight"].shape[:1] for it in "qk"
    )
    heads = config.num_attention_heads
    shared, rest = divmod(heads * sum(keys), sum(queries) or 1)
    return heads if rest or not shared else shared


def _head_dim(
    config: LayerConfig, source: Source, keys: SourceKeys, discrepancies: list[str]
) -> int:
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
    hinted = keys.get("head_dim") or config.hidden_size // config.num_attention_heads
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
    keys: SourceKeys, hints: Mapping[str, str], features: frozenset[str]
) -> list[str]:
    return [
        f"the config says {key.path}: {key.shown.lower()}, the tensors say "
        f"{str(hints[key.plain] in features).lower()}"
        for key in keys.all
        if key.plain in hints
        and key.value is not None
        and bool(key.value) != (hints[key.plain] in features)
    ]


def _contradicted_by_tensors(keys: SourceKeys, config: LayerConfig) -> list[str]:
    """Where the config speaks of another model than the tensors."""
    clauses = []
    layers = keys.find("num_hidden_layers")
    if layers and layers.value is not None and layers.value != config.num_hidden_layers:
        clauses.append(
            f"the config says {layers.path} {layers.shown}, "
            f"the tensors are those of {config.num_hidden_layers}"
        )
    for name in QUANTIZATION:
        if (key := keys.find(name)) and key.value:
            method = key.value.get("quant_method") if isinstance(key.value, dict) else None
            shown = f" ({printable(str(method))})" if method else ""
            clauses.append(
                f"the config has a {key.path}{shown}, but the tensors are not quantized; it is "
                "left out"
            )
    model_type = keys.find("model_type")
    if model_type and model_type.value is not None and str(model_type.value) not in LLAMA_LIKE:
        clauses.append(
            f"the config says {model_type.path} {model_type.shown}, and the layer is computed as "
            "Llama's, with what the tensors show, as the reference does; check that the training "
            "did, too"
        )
    return clauses
