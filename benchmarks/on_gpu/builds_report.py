"""The tables of BENCHMARKS.md that are made from the results of ``gpu_builds.py``."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from on_gpu.report import fill, markdown, met, number

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["render", "speed"]

GOALS = {"1": 1.5, "8": 3.0, "32": 3.0}
"""The batch size → the speed over that of the other build, at least."""

BUILDS = ("before", "now")

Results = dict[str, Any]


def render(results: Results, root: Path) -> None:
    """Write the tables into BENCHMARKS.md.

    Args:
        results: of ``gpu_builds.py``, with the differences examined.
        root: the root of the repository.

    """
    fill(root, {name: make(results) for name, make in TABLES.items()})


def speed(generations: list[dict[str, Any]]) -> float:
    """Tokens per second."""
    return float(
        sum(one["tokens"] for one in generations) / sum(one["seconds"] for one in generations)
    )


def speeds(results: Results) -> str:
    """By batch size, tokens per second of both builds."""
    rows = []
    for batch, goal in GOALS.items():
        said = results[batch]
        ratios = [speed(one["now"]) / speed(one["before"]) for one in said["rounds"][1:]]
        ratio = median(ratios)
        told = {name: [g for one in said["rounds"][1:] for g in one[name]] for name in BUILDS}
        plain = said.get("transformers")
        rows.append(
            (
                batch,
                number(speed(plain), 0) if plain else None,
                *(number(speed(told[name]), 0) for name in BUILDS),
                f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{goal}: {met(ratio >= goal)}",
                " / ".join(f"{ms_per_pass(told[name]):.2f}" for name in BUILDS),
                " / ".join(f"{tokens_per_step(told[name]):.2f}" for name in BUILDS),
            )
        )
    head = (
        "prompts at a time",
        "transformers, tokens/s",
        "before",
        "now",
        "now over before",
        "goal",
        "ms per step, before / now",
        "tokens per step",
    )
    return markdown(head, rows)


def ms_per_pass(generations: list[dict[str, Any]]) -> float:
    """Milliseconds per step of a batch, prefill spread over the steps."""
    passes = sum(one["passes"] for one in generations)
    return float(1000 * sum(one["seconds"] for one in generations) / passes)


def tokens_per_step(generations: list[dict[str, Any]]) -> float:
    """The acceptance length."""
    accepted, steps = (sum(one[key] for one in generations) for key in ("accepted", "steps"))
    return float(1 + accepted / steps)


def differences(results: Results) -> str:
    """By batch size, how many outputs differ from others, and how far apart the tokens were."""
    rows = []
    for batch in GOALS:
        said = results[batch]
        for name, title in (("before", "before"), ("transformers", "transformers")):
            gaps = [one["gap_in_spacings"] for one in said["differences"] if one["than"] == name]
            rows.append(
                (
                    batch,
                    title,
                    f"{said['prompts'] - len(gaps)} of {said['prompts']}",
                    number(median(gaps)),
                    number(max(gaps)),
                )
            )
    head = ("prompts at a time", "compared with", "identical", "gap, median", "gap, at most")
    return markdown(head, rows)


TABLES = {"builds": speeds, "builds-differences": differences}
