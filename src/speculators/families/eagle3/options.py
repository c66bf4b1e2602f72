"""What a user can say about an EAGLE-3 checkpoint where its files leave it open."""

import re
from typing import Any

from speculators.errors import ConversionError
from speculators.families.family import Option, Source

__all__ = ["AUX_LAYERS", "AUX_NUMBERING", "MASK_TOKEN_ID", "NORM_OUTPUT", "OPTIONS", "ask"]


def _layers(value: Any) -> list[int]:
    """The numbers of ``2,16,29`` or of a list."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", value):
        return [int(number) for number in value.split(",")]
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if not listed or not all(type(number) is int and number >= 0 for number in listed):
        raise ValueError(f"{value!r} is not a list of layers such as 2,16,29")
    return listed


def _token(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d+", value):
        return int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a token id")
    return value


def _one_of(*choices: str) -> Any:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is not {' or '.join(choices)}")
        assert isinstance(value, str)
        return value

    return read


AUX_LAYERS = Option(
    "aux_layers",
    "N,N,...",
    "The verifier's layers whose incoming states the draft reads, in ascending order.",
    _layers,
)
AUX_NUMBERING = Option(
    "aux_numbering",
    "input|output",
    "How the numbers of these layers are meant, in --aux-layers or in the draft's config.json: "
    "input, the state that enters layer N (default of --aux-layers); output, the one that "
    "leaves it.",
    _one_of("input", "output"),
)
NORM_OUTPUT = Option(
    "norm_output",
    "feedback|head-only",
    "What norm_output in the draft's config.json means: feedback, the output after the final norm "
    "is fed back (EAGLE-3.1); head-only, the norm is only applied before the head.",
    _one_of("feedback", "head-only"),
)
MASK_TOKEN_ID = Option(
    "mask_token_id",
    "N",
    "P-EAGLE: the token that stands for tokens that are not drafted yet.",
    _token,
)

OPTIONS = (AUX_LAYERS, AUX_NUMBERING, NORM_OUTPUT, MASK_TOKEN_ID)


def ask(source: Source, option: Option, why: str) -> str:
    """Stop, and ask for an option; while no verifier is known, only say that it will be asked for.

    Args:
        source: the checkpoint.
        option: the option.
        why: a sentence that says what is not known, and what the possible answers mean.

    Returns:
        A clause for the log.

    Raises:
        ConversionError: if the verifier is known, so that the conversion depends on the answer.

    """
    if source.verifier is not None:
        raise ConversionError(f"{source.checkpoint.name}: {why} Say it with {option.flag}.")
    return f"conversion asks for {option.flag}: {why.removesuffix('.')}"
