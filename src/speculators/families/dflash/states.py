"""Which of the verifier's states are the context of a DFlash draft."""

from itertools import pairwise
from typing import Any

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import ConversionError
from speculators.families.dflash.native import Said, matrix
from speculators.families.research.options import AUX_LAYERS, ask
from speculators.families.states import state_width

__all__ = ["check_states", "target_hidden_size", "verifier_states"]


def target_hidden_size(said: Said, hidden: int) -> int | None:
    """The verifier's hidden size, if it is not the draft's."""
    given = said.whole_number("target_hidden_size")
    width = state_width(said.source, given, hidden, own=("embedding", "head"))
    return None if width == hidden else width


def verifier_states(said: Said, layers: int, notes: list[str]) -> dict[str, Any]:
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
            "which do not name the same states (target_layer_ids are one less); keep the right one."
        )
    answer, told = said.source.options.get(AUX_LAYERS.name), shifted or ours
    if answer is not None and told is not None and answer != told:
        notes.append(
            f"it reads the states that enter the layers {answer}, as {AUX_LAYERS.flag} says; by "
            f"its config.json they would be {told}"
        )
    known = answer or told
    if known is None and not said.upstream and depth is not None:
        usual = _usual_layers(depth, layers)
        known = [layer + 1 for layer in usual]
        notes.append(
            "its config.json has no target_layer_ids, so it is taken to read the states that "
            f"enter the layers {known}, as the reference does with {layers} layers and a verifier "
            f"of {depth}; {AUX_LAYERS.flag} overrides this"
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


def check_states(said: Said, keys: dict[str, Any], hidden: int) -> None:
    """Check the layers against ``fc`` and the verifier; if unknown, only count them."""
    fc, width = matrix(said, "fc.weight"), keys["target_hidden_size"] or hidden
    states, rest = divmod(fc.shape[1], width)
    ids = keys["aux_hidden_state_layer_ids"]
    if rest or not states:
        raise ConversionError(
            f"{fc.file}: {fc.name} has the shape {describe_shape(fc.shape)}, which is not a whole "
            f"number of states of the verifier's hidden size {width}; give the model that the "
            "draft was trained for."
        )
    if ids is None:
        keys["aux_hidden_state_layer_ids"] = list(range(1, states + 1))
        return
    if AUX_LAYERS.name in said.source.options:
        where, shown, move = AUX_LAYERS.flag, ids, "enter"
    else:
        where, shown, move = said.where, [layer - 1 for layer in ids], "leave"
    if len(ids) != states:
        raise ConversionError(
            f"{where}: it reads the states that {move} the layers {shown}, which are "
            f"{len(ids)}, but {fc.name} of {fc.file} has the shape {describe_shape(fc.shape)} and "
            f"takes {states}."
        )
    if any(one >= other for one, other in pairwise(ids)):
        raise ConversionError(
            f"{where}: the layers {shown} are not distinct and in ascending order; engines "
            "sort them, so the states would reach the wrong columns of fc."
        )
    depth = keys["num_target_layers"]
    if ids[0] < 0 or (depth is not None and ids[-1] > depth):
        raise ConversionError(
            f"{where}: the layers {shown} (by the states that {move} them, counted from 0) do "
            f"not all lie in the verifier, which has {depth} layers."
        )
