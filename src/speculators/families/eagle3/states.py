"""Which of the verifier's states a draft reads: how many, how wide, and of which layers."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from speculators.checkpoint.tensor import describe_shape
from speculators.errors import ConversionError
from speculators.families.eagle3.config import USUAL_STATES
from speculators.families.eagle3.options import AUX_NUMBERING
from speculators.families.eagle3.publishers import Publisher, eagle_config
from speculators.families.family import Source
from speculators.families.research.options import AUX_LAYERS, ask

__all__ = ["count_states", "verifier_layers"]

LAYER_KEYS = (
    "eagle_aux_hidden_state_layer_ids",
    "aux_hidden_states_layer_ids",
    "eagle_config.eagle_aux_hidden_state_layer_ids",
    "eagle_config.layer_ids",
)
"""Keys that tell the layers, at the top or in ``eagle_config``."""

NUMBERINGS = (
    "number N can mean the state that enters the verifier's layer N (input: vLLM, speculators) or "
    "the one that leaves it (output: ModelOpt, SpecForge, TensorRT-LLM, AngelSlim)"
)


def count_states(source: Source, width: int) -> int:
    """How many states ``fc`` reads.

    Raises:
        ConversionError: if it is not a whole number, or not that of the norms or the config.

    """
    fc = source.tensors["fc.weight"]
    if len(fc.shape) != 2 or fc.shape[1] == 0 or fc.shape[1] % width:
        raise ConversionError(
            f"{fc.file}: {fc.name} has the shape {describe_shape(fc.shape)}, which is not a whole "
            f"number of states of the verifier's hidden size {width}; give the model that the "
            "draft was trained for."
        )
    states = fc.shape[1] // width
    norms = sum(name.startswith("fc_norm.") for name in source.tensors)
    said = source.checkpoint.config.get("num_aux_hidden_states")
    for what, number in (
        (f"there are {norms} norms fc_norm", norms or states),
        (f"{source.checkpoint.config_file} says num_aux_hidden_states {said}", said or states),
    ):
        if number != states:
            raise ConversionError(
                f"{fc.file}: {fc.name} {describe_shape(fc.shape)} reads {states} states of width "
                f"{width}, but {what}."
            )
    return states


def verifier_layers(
    source: Source, publisher: Publisher, states: int, notes: list[str]
) -> list[int] | None:
    """The layers whose incoming states the draft reads; ``None`` if that is still to be asked for.

    Args:
        source: the checkpoint.
        publisher: who published it.
        states: how many states it reads.
        notes: where clauses for the log are added.

    Raises:
        ConversionError: if they cannot be known without asking, or are impossible.

    """
    verifier, config = source.verifier, source.checkpoint.config
    depth = verifier.layers if verifier else None
    numbering = source.options.get(AUX_NUMBERING.name)
    given = source.options.get(AUX_LAYERS.name)
    key, said = _said(config, str(source.checkpoint.config_file), decided=given is not None)
    if given is not None:
        key = AUX_LAYERS.flag
        layers = [layer + 1 for layer in given] if numbering == "output" else list(given)
        if said is not None and said not in (layers, [layer - 1 for layer in layers]):
            notes.append(f"the layers are {layers}, as {key} says; its config.json has {said}")
    elif said is not None:
        numbered = _in_input_numbering(source, publisher, said, depth, notes)
        if numbered is None:
            return None
        layers = numbered
    elif numbering is not None:
        raise ConversionError(
            f"{source.checkpoint.config_file} has no layers whose numbers {AUX_NUMBERING.flag} "
            f"could be about; give {AUX_LAYERS.flag}."
        )
    else:
        usual = _usual(publisher, states, depth)
        if usual is None:
            notes.append(_ask_for_layers(source, publisher, states))
            return None
        notes.append(
            "its config.json does not say which states of the verifier it reads: taken to be "
            f"those entering the layers {usual}, the reference's 2, n/2 and n-3 of {depth}; "
            f"{AUX_LAYERS.flag} overrides this"
        )
        return usual
    _check(source, key, layers, states, depth)
    return layers


def _said(config: Mapping[str, Any], where: str, *, decided: bool) -> tuple[str, list[int] | None]:
    """The key that names layers, and the layers."""
    flat = dict(config) | {f"eagle_config.{k}": v for k, v in eagle_config(config).items()}
    found = {key: flat[key] for key in LAYER_KEYS if flat.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, list) or not all(type(layer) is int for layer in value):
            raise ConversionError(f"{where}, key {key}: {value!r} is not a list of layers.")
        for other, another in found.items():
            if another != value and not decided:
                raise ConversionError(
                    f"{where} says {key} {value} and {other} {another}; say which is right "
                    f"with {AUX_LAYERS.flag}, or correct it."
                )
    return next(iter(found.items()), ("", None))


def _in_input_numbering(
    source: Source, publisher: Publisher, said: list[int], depth: int | None, notes: list[str]
) -> list[int] | None:
    """The layers of a config, in input numbering; ``None`` if the numbering is to be asked for."""
    numbering = source.options.get(AUX_NUMBERING.name)
    writes = f"{publisher.name} writes {publisher.numbering} numbers"
    if depth is not None and depth in said:
        # No layer of this number has an output.
        if numbering == "output":
            raise ConversionError(
                f"{AUX_NUMBERING.flag} output contradicts {source.checkpoint.config_file}, whose "
                f"layers {said} include {depth}: the verifier has {depth} layers, numbered from 0, "
                "so these are inputs."
            )
        if publisher.numbering == "output":
            notes.append(
                f"its layers {said} include the verifier's number of layers, {depth}, so these are "
                f"input numbers, although {writes}"
            )
        return said
    if numbering is None and publisher.numbering is None:
        notes.append(
            ask(
                source,
                AUX_NUMBERING,
                f"how its layers {said} are numbered is not known: {NUMBERINGS}.",
            )
        )
        return None
    if numbering is not None and publisher.numbering not in {None, numbering}:
        notes.append(f"its layers {said} are {numbering} numbers, as asked for, although {writes}")
    if (numbering or publisher.numbering) == "input":
        return said
    layers = [layer + 1 for layer in said]
    notes.append(
        f"its layers {said} are numbered by the states that leave them"
        f"{'' if numbering else f' ({publisher.name})'}; they are written as {layers}, by the "
        "states that enter them"
        + (", unless the verifier has no more layers than the last says" if depth is None else "")
    )
    return layers


def _usual(publisher: Publisher, states: int, depth: int | None) -> list[int] | None:
    """The reference's layers (traineagle3), if a draft that says nothing surely reads them."""
    if not publisher.usual_layers or states != USUAL_STATES or depth is None:
        return None
    layers = [2, depth // 2, depth - 3]
    return layers if _ascending(layers) else None


def _ask_for_layers(source: Source, publisher: Publisher, states: int) -> str:
    by = f", written by {publisher.name}," if publisher.numbering else ""
    usually = (
        "; it usually reads those entering the layers 2, n/2 and n-3"
        if publisher.usual_layers and states == USUAL_STATES
        else ""
    )
    if usually and source.verifier is None:
        return "its config.json does not say which states it reads" + usually
    return ask(
        source,
        AUX_LAYERS,
        f"its config.json{by} does not say which {states} of the verifier's states it reads"
        f"{usually}.",
    )


def _check(source: Source, key: str, layers: list[int], states: int, depth: int | None) -> None:
    where = key if key.startswith("--") else f"{source.checkpoint.config_file}, key {key}"
    fc = source.tensors["fc.weight"]
    if len(layers) != states:
        raise ConversionError(
            f"{where}: {layers} are {len(layers)} layers, but {fc.name} of {fc.file} has the shape "
            f"{describe_shape(fc.shape)} and reads {states} states."
        )
    if not _ascending(layers):
        raise ConversionError(
            f"{where}: {layers} are not distinct and in ascending order; engines sort them, so the "
            "states would reach the wrong columns of fc. Give the order of the training with "
            f"{AUX_LAYERS.flag} if it was ascending."
        )
    if layers[0] < 0:
        raise ConversionError(f"{where}: {layers} has a negative number.")
    if depth is not None and layers[-1] > depth:
        assert source.verifier is not None
        raise ConversionError(
            f"{where}: {layers} (by the states that enter them) do not lie in the verifier "
            f"{source.verifier.name}, which has {depth} layers."
        )


def _ascending(layers: list[int]) -> bool:
    return all(one < other for one, other in pairwise(layers))
