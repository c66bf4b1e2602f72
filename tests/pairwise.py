"""Parameters of which every pair is tested always, and every combination in the exhaustive run."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

__all__ = ["pairwise"]


def pairwise(**factors: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test with combinations that hold every pair of two parameters' values.

    The other combinations have the marker ``exhaustive``. A value of a mapping gets its key as its
    id.

        @pairwise(name=["llama", "qwen2"], attention=["eager", "sdpa"], new={"few": 3, "many": 9})
    """
    values = {name: _labelled(factor) for name, factor in factors.items()}
    combinations = list(itertools.product(*values.values()))
    chosen = _covering(combinations)
    return pytest.mark.parametrize(
        list(factors),
        [
            pytest.param(
                *(value for _, value in combination),
                id="-".join(label for label, _ in combination),
                marks=() if number in chosen else pytest.mark.exhaustive,
            )
            for number, combination in enumerate(combinations)
        ],
    )


def _labelled(factor: Iterable[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(factor, Mapping):
        return list(factor.items())
    return [(str(value), value) for value in factor]


def _covering(combinations: list[tuple[tuple[str, Any], ...]]) -> set[int]:
    """The numbers of few combinations that hold all pairs: greedily, the one with most new ones."""
    pairs = [
        {*itertools.combinations([(at, it[0]) for at, it in enumerate(combination)], 2)}
        for combination in combinations
    ]
    chosen, left = set[int](), set().union(*pairs)
    while left:
        best = max(range(len(pairs)), key=lambda number: len(pairs[number] & left))
        chosen.add(best)
        left -= pairs[best]
    return chosen
