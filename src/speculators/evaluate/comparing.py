"""Comparing outputs; without torch."""

from collections.abc import Sequence
from itertools import zip_longest

from speculators.evaluate.report import Difference

__all__ = ["first_difference"]


def first_difference(plain: Sequence[int], speculative: Sequence[int]) -> Difference | None:
    """Where two outputs first differ, if they do; both are new tokens only."""
    for position, (one, other) in enumerate(zip_longest(plain, speculative)):
        if one != other:
            return Difference(position=position, plain=one, speculative=other)
    return None
