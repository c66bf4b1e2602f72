"""What a user can say about a checkpoint of several families, and how such answers are read."""

import re
from collections.abc import Callable
from typing import Any

from speculators.errors import ConversionError
from speculators.families.family import Option, Source

__all__ = ["AUX_LAYERS", "MASK_TOKEN_ID", "ask", "one_of"]


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


def one_of(*choices: str) -> Callable[[Any], str]:
    """What reads an answer that is one of these words."""

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
MASK_TOKEN_ID = Option(
    "mask_token_id",
    "N",
    "P-EAGLE, DFlash, DSpark: the token that stands for tokens that are not drafted yet.",
    _token,
)


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
        raise ConversionError(f"{source.checkpoint.name}: {why} Specify it with {option.answers}.")
    return f"conversion asks for {option.answers}: {why.removesuffix('.')}"
