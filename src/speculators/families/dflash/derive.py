"""The config of a converted draft, derived from a checkpoint of any publisher."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.errors import ConversionError
from speculators.families.dflash.attention import Attention, derive_attention, is_usual
from speculators.families.dflash.config import MASK_FILE, SLIDING, DFlashLayerConfig
from speculators.families.dflash.mask import check_mask_embedding
from speculators.families.dflash.native import LAYER, Said, publisher_of
from speculators.families.family import Completion, Derived, Source
from speculators.families.layer import DerivedLayer, derive_layer
from speculators.families.options import AUX_LAYERS, MASK_TOKEN_ID, ask
from speculators.families.states import state_width
from speculators.families.vocabulary import (
    complete_vocabulary,
    drafted_tokens,
    vocabulary_size,
)

__all__ = ["complete", "converts_again", "derive_dflash", "derive_dflash2", "derive_dspark"]

Kind = Literal["dflash", "dflash2", "dspark"]

ARCHITECTURES: Mapping[Kind, str] = {
    "dflash": "DFlashDraftModel",
    "dflash2": "DFlash2DraftModel",
    "dspark": "DSparkDraftModel",
}
"""What upstream calls the class of a draft."""

KNOWN = {
    *ARCHITECTURES.values(),
    "DFlashSpeculator",
    "DSparkSpeculator",
    "DFlash2Speculator",
    "Qwen3DFlashModel",
    "Qwen3DSparkModel",
}
"""The architectures whose layers are Qwen3's, as the format's are."""

MASK_TOKEN_KEYS = (
    "mask_token_id",
    "dspark_noise_token_id",
    "pard_token",
    "ptd_token_id",
)

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
                "the vocabulary, but no lm_head.weight; nothing is invented: give the complete "
                "checkpoint."
            )
    return completion


def converts_again(config: Mapping[str, Any]) -> bool:
    """Whether a directory in the format leaves something to guess, as upstream's do."""
    layer = config.get(LAYER)
    return (
        not isinstance(layer, dict)
        or not WRITTEN <= layer.keys()
        or not WRITTEN_AT_THE_TOP <= config.keys()
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
    anchor = _sample_from_anchor(said, kind, publisher.from_anchor, publisher.name, notes)
    attention = derive_attention(said, layers, dspark=kind == "dspark", notes=notes)
    heads = {"dflash": _no_heads, "dflash2": _selector, "dspark": _markov}[kind](said, notes)
    said.refuse_what_changes()
    keys = _states_and_tokens(said, layers, notes)
    ways = _ways_to_say(said, kind, attention)
    layer = _derive_layer(said, layers, attention, ways.pop("is_causal"))
    notes += layer.discrepancies
    keys["target_hidden_size"] = _target_hidden_size(said, layer.config.hidden_size)
    keys |= {
        "draft_vocab_size": drafted_tokens(source) or layer.config.vocab_size,
        "block_size": block_size,
        "sample_from_anchor": anchor,
        **ways,
        **heads,
    }
    _check_draft_vocabulary(said, keys["draft_vocab_size"])
    keys |= _mask(said, layer.config.vocab_size, layer.config.hidden_size, kind, notes)
    _check_ids(said, keys, layer.config.hidden_size)
    if left := said.left():
        notes.append(
            f"what the config's {', '.join(left)} means is not known; it is left out, so check "
            "that the training did not use it"
        )
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
        {
            "publisher": publisher.name,
            "drafts": f"{keys['draft_vocab_size']} of {layer.config.vocab_size} tokens, {drafted} "
            f"from a block of {block_size}",
        },
    )


def _refuse_variants(source: Source) -> None:
    for pattern, what in REFUSED.items():
        for info in source.tensors.values():
            if re.fullmatch(pattern, info.name.removeprefix("model.")):
                raise ConversionError(
                    f"{source.checkpoint.name} holds a draft with {what} (it has {info.name}), "
                    "which the speculators format cannot say; serve it as it was published."
                )


def _refuse_architectures(said: Said) -> None:
    for architecture in said.find("architectures", becomes="the draft's own are written") or ():
        if architecture not in KNOWN:
            raise ConversionError(
                f"{said.where} says architectures {architecture}, whose layers are not those of "
                f"the speculators format ({', '.join(sorted(KNOWN))}); serve it as it was "
                "published, or correct the config if the draft has Qwen3's layers."
            )


def _sample_from_anchor(
    said: Said, kind: Kind, usual: bool, publisher: str, notes: list[str]
) -> bool:
    """Whether the anchor's position drafts a token."""
    given = said.flag("sample_from_anchor")
    bonus = said.flag("dspark_bonus_anchor", becomes="it is written as sample_from_anchor")
    shifted = said.flag("shift_label", becomes="it is written as sample_from_anchor")
    answers = {it for it in (given, None if bonus is None else not bonus, shifted) if it is not None}
    if len(answers) > 1:
        raise ConversionError(
            f"{said.where}: sample_from_anchor, dspark_bonus_anchor and shift_label contradict "
            "each other; keep the one of the training."
        )
    if answers:
        return answers.pop()
    if said.upstream:
        # Upstream's own classes, which trained it; vLLM reads false.
        usual = kind == "dspark"
    if usual or kind == "dspark":
        notes.append(
            "its config.json does not say sample_from_anchor: taken to be "
            f"{str(usual).lower()}, as {publisher} trains"
        )
    return usual


def _no_heads(said: Said, notes: list[str]) -> dict[str, Any]:  # noqa: ARG001
    """A DFlash draft has no heads; a Markov head of rank 0 is none."""
    rank = said.whole_number("markov_rank", "dspark_markov_rank", at_least=0, becomes="it is 0")
    if rank:
        raise ConversionError(
            f"{said.where} says markov_rank {rank}, but the tensors have no Markov head; nothing "
            "is invented: give the complete checkpoint."
        )
    for name in ("markov_head_type", "confidence_head_with_markov"):
        said.find(name, becomes="it has no Markov head")
    if said.flag("enable_confidence_head", "use_confidence_head", becomes="it has none"):
        raise ConversionError(
            f"{said.where} says that the draft has a confidence head, but the tensors have none; "
            "nothing is invented: give the complete checkpoint."
        )
    for name in ("output_multiplier", "input_embedding_scale", "final_logit_softcapping"):
        value = said.find(name, becomes="with this value it changes nothing")
        if value not in {None, 1 if name != "final_logit_softcapping" else 0}:
            raise ConversionError(
                f"{said.where} says {name} {value!r}, which readers disagree on for a DFlash "
                "draft; remove it if the training ignored it."
            )
    return {}


def _selector(said: Said, notes: list[str]) -> dict[str, Any]:
    """The sizes of DFlash 2's convolutions and selector, and its scales."""
    tensors = said.source.tensors
    kernel, groups = (
        _matrix(said, f"layers.0.attention_conv.{name}", rank)
        for name, rank in (("base_kernel", 3), ("kernel_projection.weight", 2))
    )
    codebook = _matrix(said, "candidate_selector.predecessor_codebook", 2)
    taps, hidden = kernel.shape[1:]
    number = groups.shape[0] // (2 * taps) if taps else 0
    if not number or hidden % number:
        raise ConversionError(
            f"{groups.file}: {groups.name} has the shape {describe_shape(groups.shape)}, which "
            f"gives no groups of the {hidden} channels; give the checkpoint as it was published."
        )
    found = {
        "conv_kernel_size": taps,
        "conv_group_size": hidden // number,
        "selector_rank": codebook.shape[1],
    }
    for name, size in found.items():
        given = said.whole_number(name)
        if given not in {None, size}:
            raise ConversionError(
                f"{said.where} says {name} {given}, but the tensors have {size}; give the config "
                "that belongs to them."
            )
    top_k = said.whole_number("selector_top_k")
    if top_k is None:
        raise ConversionError(
            f"{said.where} lacks selector_top_k; add the one that the draft was trained with."
        )
    assert tensors
    scales = {}
    for name, neutral in (
        ("input_embedding_scale", 1),
        ("output_multiplier", 1),
        ("final_logit_softcapping", 0),
    ):
        value = said.find(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConversionError(f"{said.where}, key {name}: {value!r} is not a number.")
        scales[name] = None if value in {None, neutral} else value
    if changing := [name for name, value in scales.items() if value is not None]:
        notes.append(
            f"vLLM does not read {' and '.join(changing)} in the speculators format, and then "
            "computes something else: export it with --to vllm to serve it there"
        )
    return found | {"selector_top_k": top_k} | scales


def _markov(said: Said, notes: list[str]) -> dict[str, Any]:
    """What a DSpark draft's heads are."""
    features, tensors = said.source.features, said.source.tensors
    rank = _matrix(said, "markov_head.markov_w1.weight", 2).shape[1]
    given = said.whole_number("markov_rank", "dspark_markov_rank", at_least=0)
    shown = (
        "gated"
        if "gated_markov" in features
        else "rnn"
        if "rnn_markov" in features
        else "vanilla"
    )
    kind = said.find("markov_head_type", "dspark_markov_head_type")
    for name, value, found in (("markov_rank", given, rank), ("markov_head_type", kind, shown)):
        if value not in {None, found}:
            raise ConversionError(
                f"{said.where} says {name} {value}, but the tensors are those of {found}; give the "
                "config that belongs to them."
            )
    enabled = said.flag("enable_confidence_head", "use_confidence_head")
    there = "confidence_head" in features
    if enabled is not None and enabled != there:
        raise ConversionError(
            f"{said.where} says enable_confidence_head {str(enabled).lower()}, but the tensors "
            f"have {'one' if there else 'none'}; give the config that belongs to them."
        )
    with_markov = said.flag("confidence_head_with_markov")
    if there:
        info, hidden = tensors["confidence_head.proj.weight"], tensors["fc.weight"].shape[0]
        wide = info.shape[-1] != hidden
        if with_markov not in {None, wide}:
            raise ConversionError(
                f"{said.where} says confidence_head_with_markov {str(with_markov).lower()}, but "
                f"{info.name} has the shape {describe_shape(info.shape)}; give the config that "
                "belongs to it."
            )
        with_markov = wide
    if shown != "vanilla":
        notes.append(
            f"vLLM computes vanilla Markov heads alone, and not this {shown} one; SGLang computes "
            "it: export it with --to sglang"
        )
    return {
        "markov_rank": rank,
        "markov_head_type": shown,
        "enable_confidence_head": there,
        "confidence_head_with_markov": bool(with_markov) and there,
    }


def _matrix(said: Said, name: str, rank: int) -> TensorInfo:
    info = said.source.tensors[name]
    if len(info.shape) != rank or 0 in info.shape:
        raise ConversionError(
            f"{info.file}: {info.name} has the shape {describe_shape(info.shape)}, but should have "
            f"{rank} dimensions; give the checkpoint as it was published."
        )
    return info


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
        raise ConversionError(
            f"{said.source.checkpoint.name}: its layers {layers} slide and are causal, and the "
            "others are not, which today's speculators format cannot say of a "
            f"{'DFlash 2' if kind == 'dflash2' else 'DFlash'} draft: vLLM would make all of them "
            "causal. Keep the native layout, which vLLM, SGLang and llama.cpp serve as it is."
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
    source, tensors = said.source, said.source.tensors
    given = said.whole_number("num_hidden_layers")
    if given not in {None, layers}:
        raise ConversionError(
            f"{said.where} says num_hidden_layers {given}, but the tensors are those of {layers}; "
            "give the config that belongs to them."
        )
    sizes: dict[str, Any] = {}
    for key, name in (
        ("hidden_size", "fc.weight"),
        ("intermediate_size", "layers.0.mlp.gate_proj.weight"),
    ):
        found = _matrix(said, name, 2).shape[0]
        if said.layer.get(key) not in {None, found}:
            raise ConversionError(
                f"{said.where} says {key} {said.layer[key]}, but {tensors[name].name} has the "
                f"shape {describe_shape(tensors[name].shape)}; give the config that belongs to the "
                "tensors."
            )
        sizes[key] = found
    sizes["vocab_size"] = vocabulary_size(source, said.layer.get("vocab_size"))
    neox = said.flag("is_neox_style", "rope_is_neox_style")
    biased = "attention_bias" in source.features
    claimed = said.flag("attention_bias")
    if claimed is not None and claimed != biased:
        raise ConversionError(
            f"{said.where} says attention_bias {str(claimed).lower()}, but the tensors have "
            f"{'' if biased else 'no '}biases on q, k, v and o; give the config that belongs to "
            "the tensors."
        )
    _settle_rope(said)
    config = {"max_position_embeddings": 32768, **said.layer, **sizes}
    inner = replace(source.checkpoint, config=config)
    derived = derive_layer(
        replace(source, checkpoint=inner),
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
    if said.layer.get("head_dim") not in {None, derived.config.head_dim}:
        query = tensors["layers.0.self_attn.q_proj.weight"]
        raise ConversionError(
            f"{said.where} says head_dim {said.layer['head_dim']}, but {query.name} has the shape "
            f"{describe_shape(query.shape)}; give the config that belongs to the tensors."
        )
    left_out = {key: why for key, why in derived.left_out.items() if key in said.layer}
    if said.upstream:
        left_out = {f"{LAYER}.{key}": why for key, why in left_out.items()}
        left_out |= {key: RENAMED[key] for key in RENAMED if key in source.checkpoint.config}
    return DerivedLayer(derived.config, derived.discrepancies, left_out)


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
            f"{said.where} lacks rope_theta, which vLLM takes for 1000000 and transformers for "
            "10000; add the one that the draft was trained with."
        )


def _target_hidden_size(said: Said, hidden: int) -> int | None:
    given = said.whole_number("target_hidden_size")
    width = state_width(said.source, given, hidden)
    return None if width == hidden else width


def _states_and_tokens(said: Said, layers: int, notes: list[str]) -> dict[str, Any]:
    """The verifier's states that are the context, in the format's numbering."""
    verifier = said.source.verifier
    depth = verifier.layers if verifier else None
    count = said.whole_number("num_target_layers")
    if None not in (depth, count) and depth != count:
        assert verifier is not None
        raise ConversionError(
            f"{said.where} says num_target_layers {count}, but the verifier {verifier.name} has "
            f"{depth} layers; give the model that the draft was trained for."
        )
    depth = depth if depth is not None else count
    native = said.find(
        "target_layer_ids", "dspark_target_layer_ids", becomes="it is written as "
        "aux_hidden_state_layer_ids, which counts from the states that enter the layers",
    )  # fmt: skip
    ours = said.find("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
    for name, ids in (("target_layer_ids", native), ("aux_hidden_state_layer_ids", ours)):
        if ids is not None and not (isinstance(ids, list) and all(type(it) is int for it in ids)):
            raise ConversionError(f"{said.where}, key {name}: {ids!r} is not a list of layers.")
    shifted = None if native is None else [layer + 1 for layer in native]
    if None not in (shifted, ours) and shifted != ours:
        raise ConversionError(
            f"{said.where} says target_layer_ids {native} and aux_hidden_state_layer_ids {ours}, "
            "which is not the same by the states that enter the layers; keep the right one."
        )
    known = said.source.options.get(AUX_LAYERS.name) or shifted or ours
    if known is None and not said.upstream and depth is not None:
        usual = _usual_layers(depth, layers)
        known = [layer + 1 for layer in usual]
        notes.append(
            f"its config.json has no target_layer_ids: taken to be the reference's {usual} for "
            f"{layers} layers and a verifier of {depth}; {AUX_LAYERS.flag} says others"
        )
    if known is None:
        notes.append(
            ask(
                said.source,
                AUX_LAYERS,
                "its config.json does not say which of the verifier's states it reads.",
            )
        )
    return {"aux_hidden_state_layer_ids": known, "num_target_layers": depth}


def _usual_layers(depth: int, layers: int) -> list[int]:
    """The layers that a draft reads if its config does not say it (dflash 0.1.0, SGLang)."""
    if layers == 1:
        return [depth // 2]
    span = depth - 4
    return [round(1 + number * span / (layers - 1)) for number in range(layers)]


def _check_ids(said: Said, keys: dict[str, Any], hidden: int) -> None:
    """Check the layers against ``fc`` and the verifier; if unknown, only count them."""
    fc, width = _matrix(said, "fc.weight", 2), keys["target_hidden_size"] or hidden
    states, rest = divmod(fc.shape[1], width)
    ids = keys["aux_hidden_state_layer_ids"]
    if rest or not states:
        raise ConversionError(
            f"{fc.file}: {fc.name} has the shape {describe_shape(fc.shape)}, which takes no whole "
            f"number of states of the verifier's hidden size {width}; give the model that the "
            "draft was trained for."
        )
    if ids is None:
        keys["aux_hidden_state_layer_ids"] = list(range(1, states + 1))
        return
    shown = [layer - 1 for layer in ids]
    if len(ids) != states:
        raise ConversionError(
            f"{said.where}: it reads the states that leave the layers {shown}, which are "
            f"{len(ids)}, but {fc.name} of {fc.file} has the shape {describe_shape(fc.shape)} and "
            f"takes {states}."
        )
    if any(one >= other for one, other in zip(ids, ids[1:], strict=False)):
        raise ConversionError(
            f"{said.where}: the layers {shown} are not in ascending order, each once; engines "
            "sort them, so the states would reach the wrong columns of fc."
        )
    depth = keys["num_target_layers"]
    if ids[0] < 0 or (depth is not None and ids[-1] > depth):
        raise ConversionError(
            f"{said.where}: the layers {shown} (by the states that leave them, counted from 0) do "
            f"not all lie in the verifier, which has {depth} layers."
        )


def _check_draft_vocabulary(said: Said, drafted: int) -> None:
    given = said.whole_number("draft_vocab_size")
    if given not in {None, drafted}:
        raise ConversionError(
            f"{said.where} says draft_vocab_size {given}, but the draft has {drafted} tokens by "
            "its head; give the config that belongs to the tensors."
        )


def _mask(
    said: Said, vocabulary: int, hidden: int, kind: Kind, notes: list[str]
) -> dict[str, Any]:
    """The mask token, and whether it has an embedding of its own in a file."""
    answer = said.source.options.get(MASK_TOKEN_ID.name)
    token = said.whole_number(*MASK_TOKEN_KEYS, at_least=0)
    if None not in (token, answer) and token != answer:
        raise ConversionError(
            f"{MASK_TOKEN_ID.flag} {answer} contradicts {said.where}, which says {token}."
        )
    token = token if token is not None else answer
    if token is None:
        notes.append(
            ask(
                said.source,
                MASK_TOKEN_ID,
                "its config.json does not say which token stands for those that are not drafted "
                "yet.",
            )
        )
        token = 0  # not written: without a verifier, nothing is
    if token >= vocabulary:
        raise ConversionError(
            f"{said.where}: the mask token {token} is not a token of the vocabulary of "
            f"{vocabulary}."
        )
    companion = said.source.checkpoint.companions.get(MASK_FILE)
    if companion is None:
        return {"mask_token_id": token}
    if kind == "dspark":
        raise ConversionError(
            f"{said.source.checkpoint.name} has {MASK_FILE}, which no engine reads for a DSpark "
            "draft; remove it if the training did not use it."
        )
    if said.source.verifier is not None:  # otherwise no data is read
        check_mask_embedding(companion.file, token, hidden)
    return {"mask_token_id": token, "mask_embedding": True}
