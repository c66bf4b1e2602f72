"""The verifier's states that a draft reads, in all families that read several."""

from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from speculators.errors import ConversionError
from speculators.families.family import Source

__all__ = ["LayerIds", "state_width"]


def _tell_where_ids_come_from(ids: Any) -> Any:
    if ids is None:
        raise ValueError("it is null, so which states are read is not known; convert the draft")
    return ids


def _check_ids(ids: list[int]) -> list[int]:
    if ids[0] < 0 or any(one >= other for one, other in pairwise(ids)):
        raise ValueError(f"{ids} is not a list of layers in ascending order")
    return ids


LayerIds = Annotated[
    list[int],
    Field(min_length=1),
    AfterValidator(_check_ids),
    BeforeValidator(_tell_where_ids_come_from),
]
"""The verifier's layers whose incoming states a draft reads, in ascending order."""


def state_width(source: Source, said: object, hidden: int, own: Collection[str]) -> int:
    """The width of one state: the verifier's hidden size.

    Args:
        source: the checkpoint.
        said: ``target_hidden_size`` of its config.
        hidden: the draft's hidden size.
        own: the matrices, by their features, that it takes from a verifier of its own width only.

    Raises:
        ConversionError: if the config names another width than the verifier has, or the draft lacks
            a matrix that it cannot take from such a verifier.

    """
    width = _verifier_width(source, said, hidden)
    lacking = [name for name in own if name not in source.features]
    if width != hidden and lacking:
        raise ConversionError(
            f"{source.checkpoint.name} has no {lacking[0]} of its own, and cannot use the "
            f"verifier's, whose width is {width}, not {hidden}; give the checkpoint with its "
            f"{lacking[0]}."
        )
    return width


def _verifier_width(source: Source, said: object, hidden: int) -> int:
    if source.verifier is None:
        return said if type(said) is int else hidden
    width = source.verifier.hidden_size
    if width != (hidden if said is None else said):
        says = "no target_hidden_size" if said is None else f"target_hidden_size {said}"
        raise ConversionError(
            f"The draft does not fit the verifier {source.verifier.name}, whose hidden size is "
            f"{width}: {source.checkpoint.config_file} says {says}, and the draft's own is "
            f"{hidden}; give the model that it was trained for."
        )
    return width
