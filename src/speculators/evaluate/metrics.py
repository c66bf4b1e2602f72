"""The metrics of a draft, as pure functions of counts; without torch.

A *verification step* is one pass of the verifier over drafted tokens. It accepts the first n of
them and adds one token of its own, the *bonus token*, so the step yields n + 1 tokens. The token
that comes from the prefill belongs to no step. *Position* i is the i-th token of a drafted chain,
or depth i of a drafted tree; positions count from 1 in text and are at index i - 1 in lists.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Acceptance",
    "acceptance_length",
    "acceptance_rates",
    "conditional_acceptance_rates",
    "count_steps",
    "expect_steps",
    "recommended",
    "total",
]

CLOSE_TO_BEST = 0.99
"""The share of the highest speed-up that counts as equally good: below 1 % is noise."""


Count = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A number of steps; a fraction where drafts are sampled and their steps are expected ones."""


class Acceptance(BaseModel):
    """Counts over verification steps; those of several prompts are added up, never averaged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Count = 0
    """Verification steps. They and all other counts are whole numbers, unless they are expected
    values of sampled drafts that were scored on a recording."""
    offered: tuple[Count, ...] = ()
    """By position: steps in which a token was drafted there."""
    reached: tuple[Count, ...] = ()
    """By position: steps in which a token was drafted there and all before it were accepted."""
    accepted: tuple[Count, ...] = ()
    """By position: steps in which the token there was accepted, hence all before it too."""


def count_steps(accepted: Sequence[int], offered: Sequence[int]) -> Acceptance:
    """Count the verification steps of one generation.

    Args:
        accepted: by step, how many drafted tokens were accepted.
        offered: by step, how many could have been: the length of the chain or depth of the tree.

    Raises:
        ValueError: if the two differ in length, or more was accepted than offered.

    """
    steps = list(zip(accepted, offered, strict=True))
    if any(not 0 <= taken <= drafted for taken, drafted in steps):
        raise ValueError("A verification step accepts between none and all of what it is offered.")
    positions = range(1, max(offered, default=0) + 1)
    return Acceptance(
        steps=len(steps),
        offered=tuple(sum(drafted >= i for _, drafted in steps) for i in positions),
        reached=tuple(
            sum(drafted >= i and taken >= i - 1 for taken, drafted in steps) for i in positions
        ),
        accepted=tuple(sum(taken >= i for taken, _ in steps) for i in positions),
    )


def expect_steps(survival: Sequence[Sequence[int | float]]) -> Acceptance:
    """Count the verification steps that decoding a known text is expected to take.

    A step that starts at token r of the text and accepts n drafted tokens is followed by one that
    starts at token r + n + 1. Where it is certain how many are accepted, this is the walk of
    decoding, and the counts are whole numbers.

    Args:
        survival: by token of the text at which a step can start: by position, the probability that
            the drafted token there and all before it are accepted. The first step starts at the
            first of these tokens.

    """
    deepest = max(map(len, survival), default=0)
    offered, reached, accepted = (_zeros(deepest) for _ in range(3))
    visits = _zeros(len(survival) + deepest + 1)  # the last ones lie beyond the text
    visits[0] = 1
    steps: int | float = 0
    for start, chances in enumerate(survival):
        visited = visits[start]
        steps += visited
        for position, (before, surviving) in enumerate(zip([1, *chances], chances, strict=False)):
            offered[position] += visited
            reached[position] += visited * before
            accepted[position] += visited * surviving
            visits[start + position + 1] += visited * (before - surviving)
        visits[start + len(chances) + 1] += visited * (chances[-1] if chances else 1)
    depth = sum(map(bool, offered))
    return Acceptance(
        steps=steps,
        offered=tuple(offered[:depth]),
        reached=tuple(reached[:depth]),
        accepted=tuple(accepted[:depth]),
    )


def _zeros(length: int) -> list[int | float]:
    return [0] * length


def total(counts: Iterable[Acceptance]) -> Acceptance:
    """The counts of several generations, added up."""
    counts = list(counts)

    def added(column: str) -> tuple[int, ...]:
        rows = (getattr(count, column) for count in counts)
        return tuple(map(sum, zip_longest(*rows, fillvalue=0)))

    return Acceptance(
        steps=sum(count.steps for count in counts),
        offered=added("offered"),
        reached=added("reached"),
        accepted=added("accepted"),
    )


def acceptance_length(counts: Acceptance) -> float | None:
    """Mean tokens per verification step, bonus token included; ``None`` without a step.

    This is τ of the EAGLE papers (arXiv:2401.15077, section 5): between 1, where nothing is
    accepted, and one more than the length of the draft.
    """
    return (sum(counts.accepted) + counts.steps) / counts.steps if counts.steps else None


def acceptance_rates(counts: Acceptance) -> list[float]:
    """By position: the share of all verification steps in which the token there was accepted.

    Unconditional, as vLLM reports it per position: the rates fall from position to position, and
    their sum is the acceptance length minus one. A step whose tree is less deep counts as not
    accepting at the positions that it lacks.
    """
    return [accepted / counts.steps for accepted in counts.accepted]


def conditional_acceptance_rates(counts: Acceptance) -> list[float | None]:
    """By position: how often the token there was accepted if all before it were accepted.

    Steps that drafted nothing there are left out, so this measures the draft alone: it is the
    "n-alpha" of the EAGLE paper (section 5), with n one less than the position. ``None`` for a
    position that was never reached.
    """
    return [
        accepted / reached if reached else None
        for accepted, reached in zip(counts.accepted, counts.reached, strict=True)
    ]


def recommended(speedups: Sequence[float]) -> int:
    """The index of the first speed-up that is within 1 % of the highest.

    With speed-ups in order of draft length, this prefers a shorter draft unless a longer one is
    clearly faster.

    Raises:
        ValueError: if there are no speed-ups.

    """
    enough = CLOSE_TO_BEST * max(speedups)
    return next(index for index, speedup in enumerate(speedups) if speedup >= enough)
