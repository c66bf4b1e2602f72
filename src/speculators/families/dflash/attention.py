"""How a draft's layers see a block: which slide, how far, and whether they are causal.

The rules for what a config does not say are those of vLLM 0.33 (``qwen3_dflash.py``), SGLang 0.5.23
(``srt/models/dflash.py``) and z-lab's ``dflash`` 0.1.0, where they agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from speculators.errors import ConversionError
from speculators.families.dflash.config import FULL, SLIDING
from speculators.families.dflash.native import Said
from speculators.families.dflash.options import CAUSAL
from speculators.families.research.options import ask

__all__ = ["Attention", "derive_attention", "is_usual"]


@dataclass(frozen=True, slots=True)
class Attention:
    """How the layers see a block.

    Attributes:
        layer_types: of each layer.
        window: of those that slide; ``None`` if none does.
        causal: whether each layer is causal inside a block.
        known: whether the config, or an answer, tells that; an answer is asked for if not.

    """

    layer_types: tuple[str, ...]
    window: int | None
    causal: tuple[bool, ...]
    known: bool = True


def is_usual(layer_types: Sequence[str], causal: Sequence[bool]) -> bool:
    """Whether those layers are causal that slide, which native readers assume."""
    return [it == SLIDING for it in layer_types] == list(causal)


def derive_attention(said: Said, layers: int, *, dspark: bool, notes: list[str]) -> Attention:
    """Derive how the layers of a draft see a block.

    Args:
        said: its config.
        layers: how many it has.
        dspark: whether it is DSpark's, whose ``sliding_window_non_causal`` vLLM does not read.
        notes: where clauses for the log are added.

    Raises:
        ConversionError: if the config contradicts itself, or does not tell.

    """
    layer_types, window, sliding = _windows(said, layers, notes)
    answer = said.source.options.get(CAUSAL.name)
    is_causal = said.flag("is_causal", becomes="how the layers see a block is written")
    override = said.flag("causal", becomes="how the layers see a block is written")
    non_causal = said.flag("sliding_window_non_causal")
    everywhere = is_causal if is_causal is not None else override
    causal: tuple[bool, ...]
    known = True
    if everywhere is not None:
        causal = (everywhere,) * layers
    elif non_causal is True:
        causal = (False,) * layers
    elif said.upstream and not dspark and not (non_causal is False and all(sliding)):
        open_end = non_causal is False or any(sliding)
        if open_end and answer is None:
            notes.append(ask(said.source, CAUSAL, _why_causality_is_open(non_causal)))
            known = False
        elif open_end:
            return Attention(layer_types, window, (True,) * layers if answer else sliding)
        causal = (False,) * layers
    else:
        causal = sliding
    if answer is not None and set(causal) != {answer}:
        raise ConversionError(
            f"--{'' if answer else 'no-'}{CAUSAL.name} contradicts {said.where}, whose layers are "
            f"{'causal' if all(causal) else 'bidirectional' if not any(causal) else 'both'}."
        )
    if override is not None and not is_usual(layer_types, causal) and is_causal is None:
        notes.append(
            f"its dflash_config says causal {str(override).lower()}, which only vLLM reads: other "
            "engines take the layers that slide to be causal, and the others not"
        )
    return Attention(layer_types, window, causal, known)


def _why_causality_is_open(non_causal: bool | None) -> str:
    said = "lacks" if non_causal is None else "says"
    end = "" if non_causal is None else " false"
    all_are = "bidirectional" if non_causal is None else "causal"
    return (
        f"its config.json {said} sliding_window_non_causal{end}, which has two meanings for its "
        f"layers: to vLLM, all of them are {all_are}; to upstream's trainer and converter, only "
        "those that slide are causal, so that drafts of full layers, as z-lab's and most others, "
        "are bidirectional."
    )


def _windows(
    said: Said, layers: int, notes: list[str]
) -> tuple[tuple[str, ...], int | None, tuple[bool, ...]]:
    """The types of the layers, the window of those that slide, and which are causal by that.

    With ``use_swa``, layers slide that are causal, or not, as full ones.
    """
    types: Any = said.find("layer_types")
    use_swa = said.flag("use_swa", becomes="it is written as layer_types")
    used = said.flag("use_sliding_window")
    swa = said.whole_number("swa_window_size", becomes="it is written as sliding_window")
    window = said.whole_number("sliding_window")
    first = said.whole_number("max_window_layers", at_least=0, becomes="layer_types says it")
    if types is None:
        # As transformers derives it.
        slides = bool(used) and window is not None
        types = [SLIDING if slides and it >= (first or 0) else FULL for it in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise ConversionError(
            f"{said.where}, key layer_types: {types!r} are not the types of {layers} layers, each "
            f"{FULL} or {SLIDING}; give the config that belongs to the tensors."
        )
    causal = tuple(it == SLIDING for it in types)
    if use_swa and SLIDING not in types:
        types = [SLIDING] * layers  # as vLLM does, and ModelOpt means it
        notes.append("its dflash_config says use_swa, which only vLLM reads: all its layers slide")
    elif SLIDING in types and used is False:
        raise ConversionError(
            f"{said.where} says use_sliding_window false, but layer_types has layers that slide; "
            "correct the one that the draft was not trained with."
        )
    if SLIDING not in types:
        return tuple(types), None, causal
    found = swa if swa is not None else window
    if found is None:
        raise ConversionError(
            f"{said.where} has layers that slide, but no sliding_window; add the one that the "
            "draft was trained with."
        )
    return tuple(types), found, causal
