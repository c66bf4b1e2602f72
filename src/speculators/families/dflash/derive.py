"""The config of a converted draft, derived from a checkpoint of any publisher."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import ConversionError, NativeLayoutError
from speculators.families.dflash.attention import Attention, derive_attention, is_usual
from speculators.families.dflash.config import (
    SLIDING,
    DFlash2Config,
    DFlashConfig,
    DFlashLayerConfig,
    DSparkConfig,
)
from speculators.families.dflash.heads import markov, no_heads, selector
from speculators.families.dflash.mask import MASK_TOKEN_KEYS, mask_token
from speculators.families.dflash.native import (
    LAYER,
    Kind,
    Publisher,
    Said,
    architectures_of,
    matrix,
    publisher_of,
)
from speculators.families.dflash.states import check_states, target_hidden_size, verifier_states
from speculators.families.family import Completion, Derived, Source
from speculators.families.research.layer import DerivedLayer, derive_layer
from speculators.families.research.vocabulary import (
    complete_vocabulary,
    drafted_tokens,
    vocabulary_size,
)

__all__ = ["complete", "converts_again", "derive_dflash", "derive_dflash2", "derive_dspark"]

ARCHITECTURES: Mapping[Kind, str] = {
    "dflash": "DFlashDraftModel",
    "dflash2": "DFlash2DraftModel",
    "dspark": "DSparkDraftModel",
}
"""What upstream calls the class of a draft."""

CONFIGS: Mapping[Kind, type[DFlashConfig]] = {
    "dflash": DFlashConfig,
    "dflash2": DFlash2Config,
    "dspark": DSparkConfig,
}

KNOWN = {
    *ARCHITECTURES.values(),
    "DFlashSpeculator",
    "DSparkSpeculator",
    "DFlash2Speculator",
    "Qwen3DFlashModel",
    "Qwen3DSparkModel",
    # What SGLang 0.5.23 calls the same for other verifiers (srt/models/dspark.py, dflash.py).
    "LingDSparkModel",
    "Lfm2DSparkDraftModel",
    "MiniMaxDFlash2DraftModel",
}
"""The architectures whose layers are Qwen3's, as the format's are."""

ELSEWHERE = {
    "DFlash2BeamDraftModel": ("vLLM", "SGLang"),
    "Qwen3OmniDSparkModel": ("vLLM",),
}
"""Other architectures → the engines that serve them (vLLM 0.33.0, SGLang 0.5.23), which have to
read these names."""

REFUSED = {
    r".*\.attention_sink_bias": "attention sinks",
    r".*\.self_attn\.g_proj\..*|aux_hidden_norms\..*": "Laguna's gates",
    r".*\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\..*": "latent attention (MLA)",
    r".*\.mlp\.(experts|gate)\..*": "experts",
    r"mask_hidden": "P-EAGLE's mask_hidden",
}
"""Pattern of tensors → what they show a draft to have, which the format cannot say."""

RENAMED = {
    "auto_map": "it names a module of another package",
    "num_target_layers": "it is written as num_target_layers",
    "tie_word_embeddings": "a draft without a head takes the verifier's",
    "transformers_version": "the config holds nothing that depends on it",
    "speculators_config": "it is written anew",
    "speculators_model_type": "the tensors say it",
    "speculators_version": "this version writes its own",
    LAYER: "its keys are read one by one",
}
"""Key of a config → what becomes of it, or why it is left out."""

ROPE_COPIES = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "rope_dim")
"""What ``rope_dim`` makes void: copied from a verifier, and not used by the training."""

WRITTEN = {"rope_theta", "rope_parameters", "head_dim", "layer_types", "is_neox_style"}
WRITTEN_AT_THE_TOP = {
    "torch_dtype",
    "dtype",
    "draft_vocab_size",
    "sliding_window_non_causal",
    "sample_from_anchor",
    "num_target_layers",
}


def complete(source: Source) -> Completion:
    """Refuse what is DFlash only by its name; derive ``t2d`` from ``d2t``, or the reverse."""
    _refuse_variants(source)
    said = Said(source)
    completion = complete_vocabulary(source, vocabulary_size(source, said.layer.get("vocab_size")))
    for name in ("d2t", "t2d"):
        if name in source.tensors and "lm_head.weight" not in source.tensors:
            raise ConversionError(
                f"{source.checkpoint.name} has {source.tensors[name].name}, so it drafts a part of "
                "the vocabulary, but no lm_head.weight; it is not made up: give the complete "
                "checkpoint."
            )
    return completion


def converts_again(config: Mapping[str, Any]) -> bool:
    """Whether a directory in the format leaves something to guess, as upstream's do."""
    layer = config.get(LAYER)
    return (
        not isinstance(layer, dict)
        or not layer.keys() >= WRITTEN
        or not config.keys() >= WRITTEN_AT_THE_TOP
        or config.get("aux_hidden_state_layer_ids") is None
        or config.get("mask_token_id") is None
    )


def derive_dflash(source: Source) -> Derived:
    """Derive the config of a converted DFlash draft."""
    return _derive(source, "dflash")


def derive_dflash2(source: Source) -> Derived:
    """Derive the config of a converted DFlash 2 draft."""
    return _derive(source, "dflash2")


def derive_dspark(source: Source) -> Derived:
    """Derive the config of a converted DSpark draft."""
    return _derive(source, "dspark")


def _derive(source: Source, kind: Kind) -> Derived:
    said, notes = Said(source), list[str]()
    publisher = publisher_of(source.checkpoint.config)
    _refuse_architectures(said)
    layers = 1 + max(
        int(found[1]) for it in source.tensors if (found := re.match(r"layers\.(\d+)\.", it))
    )
    block_size = said.whole_number("block_size", "dspark_block_size")
    if block_size is None:
        raise ConversionError(
            f"{said.where} lacks block_size; add the one that the draft was trained with."
        )
    anchor = _sample_from_anchor(said, kind, publisher, notes)
    attention = derive_attention(said, layers, dspark=kind == "dspark", notes=notes)
    heads = {"dflash": no_heads, "dflash2": selector, "dspark": markov}[kind](said)
    said.refuse_what_changes()
    keys = verifier_states(said, layers, notes)
    ways = _ways_to_say(said, kind, attention)
    layer = _derive_layer(said, layers, attention, ways.pop("is_causal"))
    notes += layer.discrepancies
    keys["target_hidden_size"] = target_hidden_size(said, layer.config.hidden_size)
    keys |= {
        "draft_vocab_size": drafted_tokens(source) or layer.config.vocab_size,
        "block_size": block_size,
        "sample_from_anchor": anchor,
        **ways,
        **heads,
    }
    _check_draft_vocabulary(said, keys["draft_vocab_size"])
    keys |= mask_token(said, layer.config.vocab_size, layer.config.hidden_size, kind, notes)
    open_ends = {"reads"} if keys["aux_hidden_state_layer_ids"] is None else set[str]()
    open_ends |= set() if attention.known else {"attention"}
    check_states(said, keys, layer.config.hidden_size)
    if left := said.left():
        notes.append(
            f"what the config's {', '.join(left)} means is not known; it is left out, so check "
            "that the training did not use it"
        )
    # Before there is a whole config.
    config = CONFIGS[kind].model_construct(transformer_layer_config=layer.config, **keys)
    facts = {label: fact for label, fact in config.facts().items() if label not in open_ends}
    methods = source.checkpoint.config.get("speculators_config")
    given = list(methods.get("proposal_methods") or []) if isinstance(methods, dict) else []
    drafted = block_size - (not anchor)
    read = {path: why for path, why in said.read.items() if path not in keys}
    return Derived(
        layer.config,
        keys,
        [ARCHITECTURES[kind]],
        notes,
        {key: why for key, why in (layer.left_out | read).items() if key not in keys},
        kind,
        given or [{"proposal_type": "greedy", "speculative_tokens": max(drafted, 1)}],
        {"publisher": publisher.name} | facts,
    )


def _refuse_variants(source: Source) -> None:
    for pattern, what in REFUSED.items():
        for info in source.tensors.values():
            if re.fullmatch(pattern, info.name.removeprefix("model.")):
                raise ConversionError(
                    f"{source.checkpoint.name} holds a draft with {what} (it has {info.name}), "
                    "which the speculators format cannot express; serve it as it was published."
                )


def _refuse_architectures(said: Said) -> None:
    said.find("architectures", becomes="the draft's own are written")
    for architecture in architectures_of(said.source.checkpoint.config):
        if served_by := ELSEWHERE.get(architecture):
            raise NativeLayoutError(
                f"{said.where} says architectures {architecture}, which engines have to find "
                f"there, and the format does not write; {' and '.join(served_by)} "
                f"serve{'s' * (len(served_by) == 1)} it as it was published.",
                served_by,
            )
        if architecture not in KNOWN:
            raise ConversionError(
                f"{said.where} says architectures {architecture}, whose layers are not those of "
                f"the speculators format ({', '.join(sorted(KNOWN))}); serve it as it was "
                "published, or correct the config if the draft has Qwen3's layers."
            )


def _sample_from_anchor(said: Said, kind: Kind, publisher: Publisher, notes: list[str]) -> bool:
    """Whether the anchor's position drafts a token."""
    given = said.flag("sample_from_anchor")
    bonus = said.flag("dspark_bonus_anchor", becomes="it is written as sample_from_anchor")
    shifted = said.flag("shift_label", becomes="it is written as sample_from_anchor")
    answers = {given, None if bonus is None else not bonus, shifted} - {None}
    if len(answers) > 1:
        raise ConversionError(
            f"{said.where}: sample_from_anchor, dspark_bonus_anchor and shift_label contradict "
            "each other; keep the one of the training."
        )
    # As engines take it that read a native layout, and upstream's classes; vLLM reads false there.
    usual = kind == "dspark" if publisher.from_anchor is None else publisher.from_anchor
    said_so = bool(answers)
    samples = bool(answers.pop()) if said_so else usual
    if not said_so and (samples or kind == "dspark"):
        notes.append(
            "its config.json does not say sample_from_anchor: taken to be "
            f"{str(samples).lower()}, as {publisher.name} trains"
        )
    return samples


def _ways_to_say(said: Said, kind: Kind, attention: Attention) -> dict[str, Any]:
    """The keys that say which layers are causal, to all readers of the format.

    Raises:
        ConversionError: if the format cannot say it.

    """
    causal, types = attention.causal, attention.layer_types
    if kind == "dspark" and is_usual(types, causal):
        return {"sliding_window_non_causal": not any(causal), "is_causal": None}
    if len(set(causal)) > 1:
        layers = ", ".join(str(layer) for layer, it in enumerate(causal) if it)
        raise NativeLayoutError(
            f"{said.source.checkpoint.name}: its layers {layers} slide and are causal, and the "
            "others are not, which today's speculators format cannot express for a "
            f"{'DFlash 2' if kind == 'dflash2' else 'DFlash'} draft: vLLM would make all of them "
            "causal. Keep the native layout, which vLLM and SGLang serve as it is.",
            {"vLLM", "SGLang"},
        )
    everywhere = causal[0]
    by_type = kind != "dspark" and (not everywhere or set(types) == {SLIDING})
    return {
        "sliding_window_non_causal": not everywhere,
        "is_causal": None if by_type else everywhere,
    }


def _derive_layer(
    said: Said, layers: int, attention: Attention, is_causal: bool | None
) -> DerivedLayer:
    """Derive the config of the layers, with all sizes from the tensors."""
    source = said.source
    sizes = _sizes(said, layers)
    neox = said.flag("is_neox_style", "rope_is_neox_style")
    biased = _has_biases(said)
    _settle_rope(said)
    config = {**said.layer, **sizes}
    if not said.flag("use_swa", becomes="it is written as layer_types"):
        # RoPE may be given by the type of the layers; with use_swa, they slide with another type's.
        config["layer_types"] = list(attention.layer_types)
    if config.get("max_position_embeddings") is None:
        config["max_position_embeddings"] = 32768
    derived = derive_layer(
        replace(source, checkpoint=replace(source.checkpoint, config=config)),
        DFlashLayerConfig,
        {
            "model_type": "qwen3",
            "num_hidden_layers": layers,
            "attention_bias": biased,
            "layer_types": list(attention.layer_types),
            "sliding_window": attention.window,
            "is_neox_style": neox is not False,
            "is_causal": is_causal,
        },
        {},
        {key: why for key, why in RENAMED.items() if key != LAYER},
        {*RENAMED, *MASK_TOKEN_KEYS, "target_hidden_size", "draft_vocab_size"},
    )
    if said.layer.get("head_dim") not in (None, derived.config.head_dim):
        _refuse_size(said, "head_dim", "layers.0.self_attn.q_proj.weight")
    left_out = {key: why for key, why in derived.left_out.items() if key in said.layer}
    if said.upstream:
        left_out = {f"{LAYER}.{key}": why for key, why in left_out.items()}
        left_out |= {key: RENAMED[key] for key in RENAMED if key in source.checkpoint.config}
    return DerivedLayer(derived.config, derived.discrepancies, left_out)


def _sizes(said: Said, layers: int) -> dict[str, int]:
    """The sizes that the tensors show, by their keys; the config may say nothing else."""
    given = said.whole_number("num_hidden_layers")
    if given not in (None, layers):
        raise ConversionError(
            f"{said.where} says num_hidden_layers {given}, but the tensors are those of {layers}; "
            "give the config that belongs to them."
        )
    sizes = {}
    for key, name in (
        ("hidden_size", "fc.weight"),
        ("intermediate_size", "layers.0.mlp.gate_proj.weight"),
    ):
        sizes[key] = matrix(said, name).shape[0]
        if said.layer.get(key) not in (None, sizes[key]):
            _refuse_size(said, key, name)
    sizes["vocab_size"] = vocabulary_size(said.source, said.layer.get("vocab_size"))
    return sizes


def _refuse_size(said: Said, key: str, name: str) -> NoReturn:
    """Refuse a size of the config that is not the one of a tensor."""
    tensor = said.source.tensors[name]
    raise ConversionError(
        f"{said.where} says {key} {said.layer[key]}, but {tensor.name} has the shape "
        f"{describe_shape(tensor.shape)}; give the config that belongs to the tensors."
    )


def _has_biases(said: Said) -> bool:
    """Whether q, k, v and o have biases, as the tensors say; the config may say nothing else."""
    biased = "attention_bias" in said.source.features
    claimed = said.flag("attention_bias")
    if claimed is not None and claimed != biased:
        raise ConversionError(
            f"{said.where} says attention_bias {str(claimed).lower()}, but the tensors have "
            f"{'' if biased else 'no '}biases on q, k, v and o; give the config that belongs to "
            "the tensors."
        )
    return biased


def _settle_rope(said: Said) -> None:
    """Take RoPE's parameters as the training used them, and ask for a base that is missing."""
    base = said.layer.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        inner = said.layer.get(key)
        if not isinstance(inner, dict):
            continue
        base = inner.get("rope_theta", base)
        if "rope_dim" in inner and inner["rope_dim"] == said.layer.get("head_dim"):
            path = f"{LAYER}.{key}" if said.upstream else key
            for name in ROPE_COPIES:
                if name in inner:
                    said.read[f"{path}.{name}"] = "rope_dim says that the whole head is rotated"
            kept = {name: value for name, value in inner.items() if name not in ROPE_COPIES}
            said.layer[key] = kept
    if base is None and not any(
        isinstance(said.layer.get(key), dict)
        and any(isinstance(it, dict) for it in said.layer[key].values())
        for key in ("rope_parameters", "rope_scaling")
    ):
        raise ConversionError(
            f"{said.where} lacks rope_theta, which vLLM takes to be 1000000 and transformers to be "
            "10000; add the one that the draft was trained with."
        )


def _check_draft_vocabulary(said: Said, drafted: int) -> None:
    given = said.whole_number("draft_vocab_size")
    if given not in (None, drafted):
        raise ConversionError(
            f"{said.where} says draft_vocab_size {given}, but the draft has {drafted} tokens by "
            "its head; give the config that belongs to the tensors."
        )
