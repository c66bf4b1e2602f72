"""The metrics, against values computed by hand and against brute force over steps."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculators.evaluate.metrics import (
    Acceptance,
    acceptance_length,
    acceptance_rates,
    conditional_acceptance_rates,
    count_steps,
    expect_steps,
    recommended,
    total,
)

step = st.integers(0, 8).flatmap(
    lambda offered: st.tuples(st.integers(0, offered), st.just(offered))
)
generation = st.lists(step, max_size=30)


def counted(steps: list[tuple[int, int]]) -> Acceptance:
    return count_steps([taken for taken, _ in steps], [drafted for _, drafted in steps])


def test_a_generation_counted_by_hand() -> None:
    """Five steps that draft three tokens each, except for the last, which drafts one."""
    counts = count_steps(accepted=[3, 0, 1, 3, 1], offered=[3, 3, 3, 3, 1])
    assert counts == Acceptance(steps=5, offered=(5, 4, 4), reached=(5, 3, 2), accepted=(4, 2, 2))
    assert acceptance_length(counts) == (4 + 1 + 2 + 4 + 2) / 5
    assert acceptance_rates(counts) == [4 / 5, 2 / 5, 2 / 5]
    assert conditional_acceptance_rates(counts) == [4 / 5, 2 / 3, 2 / 2]


@given(generation)
def test_against_brute_force(steps: list[tuple[int, int]]) -> None:
    counts = counted(steps)
    tokens = [taken + 1 for taken, _ in steps]
    assert acceptance_length(counts) == (sum(tokens) / len(tokens) if tokens else None)
    for index, rate in enumerate(acceptance_rates(counts)):
        assert rate == sum(taken > index for taken, _ in steps) / len(steps)
    for index, conditional in enumerate(conditional_acceptance_rates(counts)):
        outcomes = [taken > index for taken, drafted in steps if drafted > index and taken >= index]
        assert conditional == (sum(outcomes) / len(outcomes) if outcomes else None)


@given(generation)
def test_the_rates_add_up_to_the_acceptance_length(steps: list[tuple[int, int]]) -> None:
    counts = counted(steps)
    if steps:
        rates = sum(Fraction(accepted) for accepted in counts.accepted) / Fraction(counts.steps)
        assert acceptance_length(counts) == pytest.approx(float(1 + rates))


@given(st.lists(generation, max_size=5))
def test_totals_are_those_of_all_steps_together(generations: list[list[tuple[int, int]]]) -> None:
    together = [step for steps in generations for step in steps]
    assert total(map(counted, generations)) == counted(together)


def test_nothing_drafted_is_one_token_a_step() -> None:
    counts = count_steps([0, 0], [0, 0])
    assert acceptance_length(counts) == 1
    assert acceptance_rates(counts) == conditional_acceptance_rates(counts) == []


def test_a_position_that_was_never_reached_has_no_conditional_rate() -> None:
    counts = count_steps([0, 0], [2, 2])
    assert acceptance_rates(counts) == [0, 0]
    assert conditional_acceptance_rates(counts) == [0, None]


@pytest.mark.parametrize(("accepted", "offered"), [([2], [1]), ([-1], [1]), ([1], [1, 1])])
def test_impossible_steps_are_refused(accepted: list[int], offered: list[int]) -> None:
    with pytest.raises(ValueError, match=r"between none and all|shorter|longer"):
        count_steps(accepted, offered)


@pytest.mark.parametrize(
    ("speedups", "index"),
    [
        ([1.0, 1.5, 1.8, 1.6], 2),
        ([1.0, 1.79, 1.8, 1.6], 1),
        ([1.0, 1.78, 1.8, 1.6], 2),
        ([0.9, 0.8], 0),
    ],
    ids=["the highest", "a shorter one within a percent", "just below", "none is faster"],
)
def test_the_shortest_draft_close_to_the_best_is_recommended(
    speedups: list[float], index: int
) -> None:
    assert recommended(speedups) == index


def test_steps_are_expected_where_it_is_not_certain_what_is_accepted() -> None:
    """Three tokens, chains of two; worked out by hand."""
    survival = [[0.5, 0.25], [1.0, 0.5], [0.0, 0.0]]
    # Token 0 is visited surely, 1 with 0.5, and 2 with 0.25 (from 0) and 0 (from 1).
    found = expect_steps(survival)
    assert found.steps == pytest.approx(1 + 0.5 + 0.25)
    assert found.offered == pytest.approx((1.75, 1.75))
    assert found.reached == pytest.approx((1.75, 1 * 0.5 + 0.5 * 1))
    assert found.accepted == pytest.approx((1 * 0.5 + 0.5 * 1, 1 * 0.25 + 0.5 * 0.5))


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
)
def test_expected_steps_are_the_walk_where_all_is_certain(right: list[int]) -> None:
    survival = [[int(position < n) for position in range(4)] for n in right]
    taken, at = [], 0
    while at < len(right):
        taken.append(right[at])
        at += right[at] + 1
    expected = count_steps(taken, [4] * len(taken))
    assert expect_steps(survival) == expected
    assert expect_steps(survival).model_dump_json() == expected.model_dump_json()


def test_a_text_of_one_token_has_no_steps() -> None:
    assert expect_steps([]) == Acceptance()
