"""What a DFlash draft has beside its layers: a selector, a Markov head, or nothing."""

from typing import Any

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import ConversionError
from speculators.families.dflash.native import Said, matrix

__all__ = ["markov", "no_heads", "selector"]


def no_heads(said: Said) -> dict[str, Any]:
    """A DFlash draft has no heads; a Markov head of rank 0 is none."""
    rank = said.whole_number("markov_rank", "dspark_markov_rank", at_least=0, becomes="it is 0")
    if rank:
        raise ConversionError(
            f"{said.where} says markov_rank {rank}, but the tensors have no Markov head; it is not "
            "made up: give the complete checkpoint."
        )
    for name in ("markov_head_type", "confidence_head_with_markov"):
        said.find(name, becomes="it has no Markov head")
    if said.flag("enable_confidence_head", "use_confidence_head", becomes="it has none"):
        raise ConversionError(
            f"{said.where} says that the draft has a confidence head, but the tensors have none; "
            "it is not made up: give the complete checkpoint."
        )
    for name in ("output_multiplier", "input_embedding_scale", "final_logit_softcapping"):
        value = said.find(name, becomes="with this value it changes nothing")
        if value not in (None, 1 if name != "final_logit_softcapping" else 0):
            raise ConversionError(
                f"{said.where} says {name} {value!r}, which readers disagree on for a DFlash "
                "draft; remove it if the training ignored it."
            )
    return {}


def selector(said: Said) -> dict[str, Any]:
    """The sizes of DFlash 2's convolutions and selector, and its scales."""
    kernel, groups = (
        matrix(said, f"layers.0.attention_conv.{name}", rank)
        for name, rank in (("base_kernel", 3), ("kernel_projection.weight", 2))
    )
    codebook = matrix(said, "candidate_selector.predecessor_codebook", 2)
    taps, hidden = kernel.shape[1:]
    number = groups.shape[0] // (2 * taps) if taps else 0
    if not number or hidden % number:
        raise ConversionError(
            f"{groups.file}: {groups.name} has the shape {describe_shape(groups.shape)}, which "
            f"does not divide the {hidden} channels into groups; give the checkpoint as it was "
            "published."
        )
    found = {
        "conv_kernel_size": taps,
        "conv_group_size": hidden // number,
        "selector_rank": codebook.shape[1],
    }
    for name, size in found.items():
        given = said.whole_number(name)
        if given not in (None, size):
            raise ConversionError(
                f"{said.where} says {name} {given}, but the tensors have {size}; give the config "
                "that belongs to them."
            )
    top_k = said.whole_number("selector_top_k")
    if top_k is None:
        raise ConversionError(
            f"{said.where} lacks selector_top_k; add the one that the draft was trained with."
        )
    scales = {}
    for name, neutral in (
        ("input_embedding_scale", 1),
        ("output_multiplier", 1),
        ("final_logit_softcapping", 0),
    ):
        value = said.find(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConversionError(f"{said.where}, key {name}: {value!r} is not a number.")
        if neutral and value is not None and not value > 0:
            raise ConversionError(f"{said.where}, key {name}: {value!r} is not over 0.")
        off = value is None or value == neutral or (not neutral and value < 0)
        scales[name] = None if off else value
    return found | {"selector_top_k": top_k} | scales


def markov(said: Said) -> dict[str, Any]:
    """What a DSpark draft's heads are."""
    features, tensors = said.source.features, said.source.tensors
    rank = matrix(said, "markov_head.markov_w1.weight", 2).shape[1]
    given = said.whole_number("markov_rank", "dspark_markov_rank", at_least=0)
    shown = (
        "gated" if "gated_markov" in features else "rnn" if "rnn_markov" in features else "vanilla"
    )
    kind = said.find("markov_head_type", "dspark_markov_head_type")
    for name, value, found in (("markov_rank", given, rank), ("markov_head_type", kind, shown)):
        if value not in (None, found):
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
        if with_markov not in (None, wide):
            raise ConversionError(
                f"{said.where} says confidence_head_with_markov {str(with_markov).lower()}, but "
                f"{info.name} has the shape {describe_shape(info.shape)}; give the config that "
                "belongs to it."
            )
        with_markov = wide
    return {
        "markov_rank": rank,
        "markov_head_type": shown,
        "enable_confidence_head": there,
        "confidence_head_with_markov": bool(with_markov) and there,
    }
