"""The config of a converted draft, derived from a checkpoint of any publisher."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import ConversionError, printable
from speculators.families.eagle3.config import Eagle3LayerConfig
from speculators.families.eagle3.embedding import compared_embedding
from speculators.families.eagle3.options import NORM_OUTPUT
from speculators.families.eagle3.publishers import (
    MODELOPT,
    SPECULATORS,
    Publisher,
    eagle_config,
    publisher_of,
)
from speculators.families.eagle3.states import count_states, verifier_layers
from speculators.families.eagle3.types import check_types
from speculators.families.family import Completion, Derived, Source
from speculators.families.research.layer import REFERENCE_ROPE_BASE, DerivedLayer, derive_layer
from speculators.families.research.options import MASK_TOKEN_ID, ask
from speculators.families.research.vocabulary import (
    complete_vocabulary,
    drafted_tokens,
    vocabulary_size,
)
from speculators.families.states import state_width
from speculators.format.config import LayerConfig

__all__ = ["ARCHITECTURES", "complete", "converts_again", "derive"]

ARCHITECTURES = {"eagle3": "Eagle3Speculator", "peagle": "PEagleDraftModel"}
"""What upstream calls the class of a draft, by its ``speculators_model_type``."""

MASK_TOKEN_KEYS = ("mask_token_id", "pard_token", "ptd_token_id")
"""Keys of the token that stands for what is not drafted yet: speculators, vLLM, AWS."""

OFFSET_NORMS = re.compile(r"(Recurrent)?Gemma[23]?For\w+|Qwen3NextFor\w+|Qwen3_5(Moe)?For\w+")
"""Architectures of verifiers whose final norm multiplies by one plus its weight."""

READ = {
    *MASK_TOKEN_KEYS,
    "draft_vocab_size",
    "eagle_aux_hidden_state_layer_ids",
    "embed_requires_grad",
    "fc_bias",
    "fc_norm",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "parallel_drafting",
    "proposal_methods",
    "return_hidden_post_norm",
    "speculators_config",
    "speculators_model_type",
    "speculators_version",
    "target_hidden_size",
    "transformer_layer_config",
    "use_aux_hidden_state",
    "use_aux_norm",
}
"""Keys of the source's config that are read here, and not by the layer."""

SHOWN_BY = {
    "input_norm": "input_norm",
    "fc_norm": "fc_norm",
    "attention_bias": "biases on q, k, v and o",
    "mlp_bias": "biases in the MLP",
}
"""Feature that a config claims → the tensors that show it."""

RENAMED = {
    "aux_hidden_states_layer_ids": "it is written as eagle_aux_hidden_state_layer_ids",
    "auto_map": "it names a module of another package",
    "eagle_config": "its parts are written at the top of the config, or the tensors say them",
    "num_depths": "it is about training",
    "num_aux_hidden_states": "it is the number of eagle_aux_hidden_state_layer_ids",
    "pard_token": "it is written as mask_token_id",
    "ptd_token_id": "it is written as mask_token_id",
    "parallel_drafting": "the tensors say it",
    "rope_parameters": "it is written in both spellings",
    "speculators_config": "it is written anew",
    "speculators_model_type": "the tensors say it",
    "speculators_version": "this version writes its own",
    "tie_word_embeddings": "the head is never the embedding",
    "transformers_version": "the config holds nothing that depends on it",
    "use_aux_norm": "it is written as fc_norm",
}
"""Key of a config → what becomes of it, or why it is left out."""


def complete(source: Source) -> Completion:
    """Refuse what is EAGLE-3 only by its name; derive ``t2d`` from ``d2t``, or the reverse."""
    _refuse_variants(source)
    check_types(source)
    return complete_vocabulary(source, vocabulary_size(source, _layer(source).get("vocab_size")))


def converts_again(config: Mapping[str, Any]) -> bool:
    """Whether a directory in the format leaves something to guess, as upstream's do."""
    layer = config.get("transformer_layer_config")
    return (
        not isinstance(layer, dict)
        or not {"rope_theta", "rope_parameters", "head_dim"} <= layer.keys()
        or not {"torch_dtype", "dtype", "norm_before_residual", "fc_norm"} <= config.keys()
        or config.get("eagle_aux_hidden_state_layer_ids") is None
    )


def derive(source: Source) -> Derived:
    """Derive the config of a converted draft from a checkpoint of any publisher."""
    publisher, given = publisher_of(source), source.checkpoint.config
    notes: list[str] = []
    layer = _derive_layer(source)
    notes += layer.discrepancies
    hidden, drafted = layer.config.hidden_size, drafted_tokens(source)
    assert drafted is not None
    _check_said(source, given, "draft_vocab_size", drafted, "lm_head.weight")
    width = state_width(source, given.get("target_hidden_size"), hidden, own=("embedding",))
    states = count_states(source, width)
    known = verifier_layers(source, publisher, states, notes)
    # Without a verifier, they may not be known yet: these are the usual ones of a small verifier.
    supposed = list(range(2, 2 + states))
    model_type = "peagle" if "mask_hidden" in source.features else "eagle3"
    keys = {
        "draft_vocab_size": drafted,
        "eagle_aux_hidden_state_layer_ids": known or supposed,
        "target_hidden_size": None if width == hidden else width,
        "norm_before_residual": _norm_before_residual(source, publisher),
        "norm_before_fc": _feature(source, "input_norm", "norm_before_fc"),
        "fc_norm": _feature(source, "fc_norm", "fc_norm", "use_aux_norm"),
        "norm_output": _norm_output(source, publisher, notes),
        "fc_bias": "fc_bias" in source.features or None,
        "mask_token_id": _mask_token(source, layer.config.vocab_size, notes),
        "embed_requires_grad": model_type == "peagle" or bool(given.get("embed_requires_grad")),
        "speculators_model_type": model_type,
    }
    _warn(source, publisher, layer.config, notes)
    facts = {
        "publisher": publisher.name,
        "reads": f"{states} of the verifier's states"
        + (f": those entering its layers {', '.join(map(str, known))}" if known else ""),
        "drafts": f"{drafted} of {layer.config.vocab_size} tokens",
    }
    methods = given.get("speculators_config")
    return Derived(
        layer.config,
        keys,
        [ARCHITECTURES[model_type]],
        notes,
        {key: why for key, why in layer.left_out.items() if key not in keys},
        model_type,
        list(methods.get("proposal_methods") or []) if isinstance(methods, dict) else [],
        facts,
        None if known else supposed[-1] + 3,
    )


def _refuse_variants(source: Source) -> None:
    """Refuse drafts that compute something else than this family does."""
    name, tensors, config = source.checkpoint.name, source.tensors, source.checkpoint.config

    def refuse(what: str, since: str) -> ConversionError:
        return ConversionError(
            f"{name} holds an EAGLE-3 draft {what} ({since}), which is not converted: it computes "
            "something different from other EAGLE-3 drafts."
        )

    layer = _layer(source)
    for key in ("model_type", "intermediate_size_mlp"):
        if layer.get(key) is not None and (key != "model_type" or layer[key] == "llama4_text"):
            raise refuse("with a Llama-4 MLP", f"config.json says {key} {layer[key]}")
    if eagle_config(config).get("use_aux_hidden_state") is False:
        raise refuse(
            "that reads only the verifier's last state",
            "config.json says use_aux_hidden_state false",
        )
    fc, norm = tensors.get("fc.weight"), tensors.get("norm.weight")
    if fc is None:
        raise refuse("that reads only the verifier's last state", "it has no fc.weight")
    if norm is not None and len(fc.shape) == 2 and norm.shape and fc.shape[0] > norm.shape[0]:
        raise refuse(
            "with SpecExit's early-stop signals",
            f"{fc.name} has {fc.shape[0]} rows for a hidden size of {norm.shape[0]}",
        )
    if "lm_head.weight" not in tensors and layer.get("tie_word_embeddings"):
        raise ConversionError(
            f"{name} has no lm_head.weight, and its config.json says tie_word_embeddings: its head "
            "may be its own embedding, which transformers does not store twice, or the verifier's, "
            "which engines take; save it with the lm_head.weight that it was trained with."
        )
    rope = {**(layer.get("rope_scaling") or {}), **(layer.get("rope_parameters") or {})}
    if "mrope_section" in rope or "mrope" in {rope.get("type"), rope.get("rope_type")}:
        raise refuse("with M-RoPE", "config.json says mrope")
    for where in (layer, rope):
        if where.get("partial_rotary_factor", 1) not in {1, None}:
            raise refuse(
                "with a partial rotary embedding", "config.json says partial_rotary_factor"
            )
    if layer.get("use_sliding_window") or "sliding_attention" in (layer.get("layer_types") or ()):
        raise refuse("with a sliding window", "config.json says so")


def _layer(source: Source) -> Mapping[str, Any]:
    """The keys of the draft's layers: nested in upstream's format, else at the top."""
    nested = source.checkpoint.config.get("transformer_layer_config")
    return nested if isinstance(nested, dict) else source.checkpoint.config


def _derive_layer(source: Source) -> DerivedLayer:
    """Derive the config of the layers, with all sizes from the tensors."""
    given = _layer(source)
    nested = given is not source.checkpoint.config
    sizes, layers = _sizes(source, given), _count_layers(source, given)
    _check_rope_bases(source, given)
    normed = "qk_norm" in source.features
    if normed and "mlp_bias" in source.features:
        raise ConversionError(
            f"{source.checkpoint.name} has norms on queries and keys and biases in the MLP; no "
            "layer of the format has both."
        )
    model_type = given.get("model_type") if nested else None
    if model_type is not None and (model_type == "qwen3") != normed:
        raise ConversionError(
            f"{source.checkpoint.config_file} says model_type {model_type}, but the "
            f"tensors have {'' if normed else 'no '}q_norm and k_norm."
        )
    biased = {
        key: _feature(source, key, key, within=given) for key in ("attention_bias", "mlp_bias")
    }
    if given.get("bias") and not {"fc_bias", "attention_bias"} & source.features:
        raise ConversionError(
            f"{source.checkpoint.config_file} says bias {given['bias']}, but neither fc nor the "
            "attention has one among the tensors."
        )
    heads = given.get("num_attention_heads")
    derived = derive_layer(
        replace(source, checkpoint=replace(source.checkpoint, config={**given, **sizes})),
        Eagle3LayerConfig,
        {"model_type": "qwen3" if normed else "llama", "num_hidden_layers": layers, **biased},
        {},
        {key: why for key, why in RENAMED.items() if key != "rope_parameters"},
        READ,
    )
    if given.get("head_dim") not in {None, derived.config.head_dim}:
        query = source.tensors["layers.0.self_attn.q_proj.weight"]
        raise ConversionError(
            f"{source.checkpoint.config_file} says head_dim {given['head_dim']} and "
            f"num_attention_heads {heads}, but {query.name} has the shape "
            f"{describe_shape(query.shape)}; give the config that belongs to the tensors."
        )
    left_out = {**derived.left_out}
    if nested:
        left_out = {f"transformer_layer_config.{key}": why for key, why in left_out.items()}
        left_out |= {
            key: RENAMED.get(key, "this version writes its own")
            for key in source.checkpoint.config
            if key not in {"transformer_layer_config", "tie_word_embeddings"}
        }
    return DerivedLayer(derived.config, derived.discrepancies, left_out)


def _sizes(source: Source, given: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the tensors show, by their keys; a config that says others is refused."""
    sizes = {}
    for key, name in (
        ("hidden_size", "fc.weight"),
        ("intermediate_size", "layers.0.mlp.gate_proj.weight"),
    ):
        info = source.tensors[name]
        if len(info.shape) != 2:
            raise ConversionError(
                f"{info.file}: {info.name} has the shape {describe_shape(info.shape)}, but is "
                "a matrix."
            )
        sizes[key] = info.shape[0]
        _check_said(source, given, key, sizes[key], name)
    sizes["vocab_size"] = vocabulary_size(source, given.get("vocab_size"))
    return sizes


def _count_layers(source: Source, given: Mapping[str, Any]) -> int:
    """The number of decoder layers that the tensors show; a config that says another is refused."""
    numbered = (re.match(r"layers\.(\d+)\.", name) for name in source.tensors)
    layers = 1 + max(int(found[1]) for found in numbered if found)
    if given.get("num_hidden_layers") not in (None, layers):
        said = printable(repr(given["num_hidden_layers"]))
        raise ConversionError(
            f"{source.checkpoint.config_file} says num_hidden_layers {said}, "
            f"but the tensors are those of {layers}; give the config that belongs to them."
        )
    return layers


def _check_said(
    source: Source, given: Mapping[str, Any], key: str, found: int, tensor: str
) -> None:
    info = source.tensors[tensor]
    if given.get(key) not in {None, found}:
        raise ConversionError(
            f"{source.checkpoint.config_file} says {key} {given[key]}, but {info.name} of "
            f"{info.file} has the shape {describe_shape(info.shape)}; give the config that belongs "
            "to the tensors."
        )


def _check_rope_bases(source: Source, given: Mapping[str, Any]) -> None:
    bases = {
        f"{key}.rope_theta": base
        for key in ("rope_parameters", "rope_scaling")
        if (base := (given.get(key) or {}).get("rope_theta")) is not None
    } | ({"rope_theta": given["rope_theta"]} if given.get("rope_theta") is not None else {})
    if len(set(bases.values())) > 1:
        said = " and ".join(f"{key} {base}" for key, base in bases.items())
        raise ConversionError(
            f"{source.checkpoint.config_file} says {said}; keep the one of the training."
        )


def _feature(
    source: Source, feature: str, *keys: str, within: Mapping[str, Any] | None = None
) -> bool:
    """Whether the tensors show a feature; a config that says otherwise is an error."""
    config = source.checkpoint.config if within is None else within
    shown = feature in source.features
    for key in keys:
        for where, said in (
            (key, config.get(key)),
            (f"eagle_config.{key}", eagle_config(config).get(key)),
        ):
            if said is not None and bool(said) != shown:
                raise ConversionError(
                    f"{source.checkpoint.config_file} says {where} {str(said).lower()}, but the "
                    f"tensors have {'' if shown else 'no '}{SHOWN_BY[feature]}; give the "
                    "config that belongs to the tensors."
                )
    return shown


def _norm_before_residual(source: Source, publisher: Publisher) -> bool:
    config = source.checkpoint.config
    said = config.get("norm_before_residual", eagle_config(config).get("norm_before_residual"))
    if said is None and publisher is SPECULATORS:
        raise ConversionError(
            f"{source.checkpoint.config_file} lacks norm_before_residual, which vLLM takes to be "
            "true and speculators to be false; add the one that it was trained with."
        )
    return bool(said)


def _norm_output(source: Source, publisher: Publisher, notes: list[str]) -> bool:
    """Whether the output of the final norm is fed back."""
    config = source.checkpoint.config
    nested = eagle_config(config)
    said = config.get("norm_output", nested.get("norm_output"))
    answer = source.options.get(NORM_OUTPUT.name)
    certain = publisher.feeds_back or said is None
    if said is None and nested.get("return_hidden_post_norm"):
        said = True
    if certain:
        if answer is not None and (answer == "feedback") != bool(said):
            raise ConversionError(
                f"{NORM_OUTPUT.flag} {answer} contradicts {source.checkpoint.config_file}, whose "
                f"norm_output ({'absent' if said is None else str(said).lower()}) is not ambiguous."
            )
        return bool(said)
    if answer is None:
        notes.append(ask(source, NORM_OUTPUT, _why_norm_output_is_open(bool(said))))
        return bool(said)
    if answer == "feedback" and not said:
        raise ConversionError(
            f"{NORM_OUTPUT.flag} feedback contradicts {source.checkpoint.config_file}, which says "
            "norm_output false."
        )
    return bool(answer == "feedback")


def _why_norm_output_is_open(said: bool) -> str:
    if said:
        return (
            "its config.json says norm_output true, which has two meanings: in EAGLE-3.1, to "
            "engines, and in SpecForge since pull request 879 (September 2026), the output after "
            "the final norm is fed back (feedback); to SpecForge up to 0.2.0, the norm is only "
            "applied before the head, and the output before it is fed back (head-only)."
        )
    return (
        "its config.json says norm_output false, which has two meanings: to engines, and in "
        "SpecForge since pull request 879 (September 2026), the output before the final norm is "
        "fed back and the norm applied before the head (head-only); a draft of SpecForge up to "
        "0.2.0 has no final norm at all then; no engine serves it, and it is not converted."
    )


def _mask_token(source: Source, vocabulary: int, notes: list[str]) -> int | None:
    """The token that stands for what is not drafted yet; ``None`` if none does."""
    config, where = source.checkpoint.config, source.checkpoint.config_file
    said = {key: config[key] for key in MASK_TOKEN_KEYS if config.get(key) is not None}
    if (answer := source.options.get(MASK_TOKEN_ID.name)) is not None:
        said[MASK_TOKEN_ID.flag] = answer
    claims = dict(said)
    if config.get("parallel_drafting") or config.get("speculators_model_type") == "peagle":
        claims["parallel drafting"] = "true"
    if "mask_hidden" not in source.features:
        if claims:
            key, value = next(iter(claims.items()))
            raise ConversionError(
                f"{source.checkpoint.name}: {key} {value} is that of a P-EAGLE draft, but the "
                "tensors have no mask_hidden."
            )
        return None
    if "embedding" not in source.features:
        raise ConversionError(
            f"{source.checkpoint.name} has mask_hidden, so it drafts in parallel (P-EAGLE), but no "
            "embed_tokens.weight: its embedding was trained with it, and the verifier's does not "
            "replace it."
        )
    if config.get("speculators_model_type") == "eagle3" or config.get("parallel_drafting") is False:
        raise ConversionError(
            f"{where} says that it does not draft in parallel, but the tensors have mask_hidden."
        )
    if len(set(said.values())) > 1:
        different = " and ".join(f"{key} {value}" for key, value in said.items())
        raise ConversionError(f"{where}: {different}; only one of them can be meant.")
    if not said:
        notes.append(
            ask(
                source,
                MASK_TOKEN_ID,
                "it drafts in parallel (P-EAGLE), and its config.json does not say which token "
                "stands for those that are not drafted yet.",
            )
        )
        return 0  # not written: without a verifier, nothing is
    key, token = next(iter(said.items()))
    if type(token) is not int or not 0 <= token < vocabulary:
        raise ConversionError(f"{key} {token!r} is not a token of the vocabulary of {vocabulary}.")
    return token


def _verifiers(source: Source) -> list[str]:
    """What the config of a draft in the format calls its verifier's class."""
    settings = source.checkpoint.config.get("speculators_config")
    verifier = settings.get("verifier") if isinstance(settings, dict) else None
    named = verifier.get("architectures") if isinstance(verifier, dict) else None
    return [it for it in named if isinstance(it, str)] if isinstance(named, list) else []


def _warn(source: Source, publisher: Publisher, layer: LayerConfig, notes: list[str]) -> None:
    """Tell what cannot be seen in the tensors, and what engines do with the draft."""
    features = source.features
    if clause := compared_embedding(source):
        notes.append(clause)
    if publisher is MODELOPT:
        notes.append(
            "ModelOpt (0.47.0) trains with hidden_norm(input_layernorm(x)) where every engine, and "
            "this package, computes hidden_norm(x): tensors cannot show whether this draft was"
        )
    if publisher is SPECULATORS and any(map(OFFSET_NORMS.fullmatch, _verifiers(source))):
        notes.append(
            "speculators (0.9.0) trains a draft of this verifier on other logits than it has, with "
            "a final norm that lacks the 1 that the verifier's adds to its weight: tensors cannot "
            "show whether this draft was"
        )
    if publisher.name in {"SafeAILab", "AngelSlim"} and layer.rope_theta != REFERENCE_ROPE_BASE:
        notes.append(
            f"rope_theta {layer.rope_theta:g} is used, as engines do; SafeAILab's and AngelSlim's "
            f"trainers always used {REFERENCE_ROPE_BASE:g}"
        )
    if "mask_hidden" in features and layer.rope_type != "default" and publisher.usual_layers:
        notes.append(
            f"its {layer.rope_type} RoPE scaling is used, as engines do; SpecForge's trainer of "
            "P-EAGLE ignores it"
        )
    if "fc_bias" in features:
        notes.append(
            "vLLM and the PyPI project speculators silently drop fc.bias, and then draft badly"
        )
    if {"qk_norm", "attention_bias"} <= features:
        notes.append(
            "vLLM silently drops o_proj.bias of a layer with norms on queries and keys, and then "
            "drafts badly"
        )
    if {"mask_hidden", "fc_norm"} <= features:
        notes.append("vLLM does not read fc_norm of a P-EAGLE draft, and refuses it")
