"""The plots of a report, as PNG files; matplotlib is imported only to draw them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from speculators.evaluate.report import Comparison, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_comparison_plots", "write_plots"]

BLUE, ORANGE, GREY = "#3b6ea8", "#d1762b", "#888888"
SIZE = (7.0, 4.2)
"""In inches, at 150 dots per inch."""


def write_plots(report: Report, directory: Path) -> list[Path]:
    """Draw the plots that the report has data for.

    These are acceptance by position for the longest draft, acceptance length by category for
    ``report.shown``, and the speed-up by draft length if several lengths were measured with their
    speed.

    Returns:
        The files, named after what they show.

    Raises:
        ImportError: if matplotlib is not installed; nothing is written then.

    """
    plots: dict[str, Callable[[Axes], None]] = {
        "acceptance_by_position.png": partial(_acceptance_by_position, report),
        "acceptance_length_by_category.png": partial(_acceptance_length_by_category, report),
    }
    if report.recommendation is not None:
        plots["speedup_by_draft_length.png"] = partial(_speedup_by_draft_length, report)
    return _written(plots, directory)


def write_comparison_plots(comparison: Comparison, directory: Path) -> list[Path]:
    """Draw acceptance by position, with a line for each draft; see ``write_plots``."""
    draw = partial(_acceptance_by_draft, comparison)
    return _written({"acceptance_by_position.png": draw}, directory)


def _written(plots: dict[str, Callable[[Axes], None]], directory: Path) -> list[Path]:
    from matplotlib.figure import Figure  # no pyplot: no display, no state, Agg for PNG

    written = []
    for name, draw in plots.items():
        figure = Figure(figsize=SIZE, dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.savefig(directory / name)
        written.append(directory / name)
    return written


def _acceptance_by_position(report: Report, axes: Axes) -> None:
    summary = report.longest.overall
    positions = range(1, len(summary.acceptance_rates) + 1)
    for side, color, rates, label in (
        (-0.2, BLUE, summary.acceptance_rates, "of all steps"),
        (0.2, ORANGE, summary.conditional_acceptance_rates, "of those that accepted all before"),
    ):
        bars = axes.bar(
            [position + side for position in positions],
            [rate or 0.0 for rate in rates],
            color=color,
            width=0.38,
            label=label,
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set(
        title=f"Acceptance by position ({report.longest.name})",
        xlabel="position in the draft",
        ylabel="share accepted",
        xticks=positions,
        ylim=(0, 1.2),
        yticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
    )
    axes.legend(frameon=False, loc="upper right", ncols=2)


def _acceptance_by_draft(comparison: Comparison, axes: Axes) -> None:
    deepest = 0
    for report in comparison.drafts:
        summary = report.longest.overall
        deepest = max(deepest, len(summary.acceptance_rates))
        positions = range(1, len(summary.acceptance_rates) + 1)
        length = summary.acceptance_length
        label = report.draft if length is None else f"{report.draft}: {length:.2f}"
        axes.plot(positions, summary.acceptance_rates, marker="o", label=label)
    axes.set(
        title=f"Acceptance by position, of all steps ({comparison.drafts[0].longest.name})",
        xlabel="position in the draft",
        ylabel="share accepted",
        xticks=range(1, deepest + 1),
        ylim=(0, 1),
    )
    axes.legend(frameon=False, loc="upper right", title="draft: tokens per step")


def _acceptance_length_by_category(report: Report, axes: Axes) -> None:
    lengths = {
        category: summary.acceptance_length
        for category, summary in report.shown.categories.items()
        if summary.acceptance_length is not None
    }
    ordered = ["overall", *sorted(lengths, key=lambda category: lengths[category])]
    overall = report.shown.overall.acceptance_length or 1.0
    bars = axes.barh(
        range(len(ordered)),
        [overall, *(lengths[category] for category in ordered[1:])],
        color=[ORANGE, *[BLUE] * len(lengths)],
        height=0.6,
        tick_label=ordered,
    )
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(
        title=f"Acceptance length by category ({report.shown.name})",
        xlabel="tokens per verification step",
    )
    axes.margins(x=0.1)


def _speedup_by_draft_length(report: Report, axes: Axes) -> None:
    recommendation = report.recommendation
    assert recommendation is not None
    speedups = {
        result.proposal.speculative_tokens: result.overall.speedup or 0.0
        for result in report.results
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
        title=f"Speed-up by draft length, {report.environment.where}",
        xlabel="drafted tokens per step",
        ylabel="speed-up",
        xticks=list(speedups),
    )
    axes.set_ylim(0, 1.1 * max(1, *speedups.values()))
    axes.legend(frameon=False, loc="lower right")
