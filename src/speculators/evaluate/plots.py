"""The plots of a report, as PNG files; matplotlib is imported when one is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from speculators.evaluate.report import ProposalResult, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_plots"]

BLUE, ORANGE, GREY = "#3b6ea8", "#d1762b", "#888888"
SIZE = (7.0, 4.2)
"""Inches, at 150 dots each."""


def write_plots(report: Report, directory: Path) -> list[Path]:
    """Draw what the report can show.

    Acceptance by position and acceptance length by category, both of ``report.shown``; and the
    speed-up against the draft length, if several lengths were measured with their speed.

    Returns:
        The files, named after what they show.

    Raises:
        ImportError: if matplotlib is not installed; nothing is written then.

    """
    from matplotlib.figure import Figure  # no pyplot: no display, no state, Agg for PNG

    plots = {
        "acceptance_by_position.png": _acceptance_by_position,
        "acceptance_length_by_category.png": _acceptance_length_by_category,
    }
    if report.recommendation is not None:
        plots["speedup_by_draft_length.png"] = _speedup_by_draft_length
    written = []
    for name, draw in plots.items():
        figure = Figure(figsize=SIZE, dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(report, axes)
        figure.savefig(directory / name)
        written.append(directory / name)
    return written


def _acceptance_by_position(report: Report, axes: Axes) -> None:
    summary = report.shown.overall
    positions = range(1, len(summary.acceptance_rates) + 1)
    bars = axes.bar(
        positions, summary.acceptance_rates, color=BLUE, width=0.6, label="of all steps"
    )
    axes.bar_label(bars, fmt="%.2f", padding=2)
    reached = [
        (position, rate)
        for position, rate in zip(positions, summary.conditional_acceptance_rates, strict=True)
        if rate is not None
    ]
    axes.plot(
        [position for position, _ in reached],
        [rate for _, rate in reached],
        color=ORANGE,
        marker="o",
        label="of the steps that accepted all before",
    )
    axes.set(
        title=f"Acceptance by position ({_named(report.shown)})",
        xlabel="position in the draft",
        ylabel="share accepted",
        xticks=positions,
        ylim=(0, 1.05),
    )
    axes.legend(frameon=False)


def _acceptance_length_by_category(report: Report, axes: Axes) -> None:
    lengths = {
        category: summary.acceptance_length
        for category, summary in report.shown.categories.items()
        if summary.acceptance_length is not None
    }
    ordered = sorted(lengths, key=lambda category: lengths[category])
    bars = axes.barh(ordered, [lengths[category] for category in ordered], color=BLUE, height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    overall = report.shown.overall.acceptance_length
    if overall is not None:
        axes.axvline(overall, color=ORANGE, linestyle="--", label=f"overall: {overall:.2f}")
        axes.legend(frameon=False, loc="lower right")
    axes.set(
        title=f"Acceptance length by category ({_named(report.shown)})",
        xlabel="tokens per verification step",
    )
    axes.margins(x=0.1)


def _speedup_by_draft_length(report: Report, axes: Axes) -> None:
    recommendation = report.recommendation
    assert recommendation is not None
    speedups = {
        result.proposal.speculative_tokens: result.overall.speedup for result in report.results
    }
    axes.axhline(1, color=GREY, linestyle="--", label="the verifier alone")
    axes.plot(list(speedups), list(speedups.values()), color=BLUE, marker="o", label="measured")
    axes.plot(
        recommendation.speculative_tokens,
        recommendation.speedup,
        color=ORANGE,
        marker="o",
        markersize=12,
        fillstyle="none",
        linestyle="none",
        label=f"recommended: {recommendation.speculative_tokens}",
    )
    axes.set(
        title=f"Speed-up by draft length ({report.environment.device})",
        xlabel="drafted tokens per step",
        ylabel="speed-up",
        xticks=list(speedups),
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _named(result: ProposalResult) -> str:
    return f"{result.proposal.proposal_type}, {result.proposal.speculative_tokens} tokens"
