"""A report as a directory: report.json and the plots."""

from collections.abc import Callable
from pathlib import Path

from loguru import logger

from speculators.checkpoint.output.staging import Marker, staged_directory
from speculators.evaluate.plots import write_comparison_plots, write_plots
from speculators.evaluate.report import COMPARISON_FILE, REPORT_FILE, Comparison, Report

__all__ = ["COMPARISON", "REPORT", "save_comparison", "save_report"]

REPORT = Marker("a report of speculators", REPORT_FILE, "speculators_report")
COMPARISON = Marker("a comparison of speculators", COMPARISON_FILE, "speculators_comparison")


def save_report(report: Report, output: Path, *, overwrite: bool = False) -> None:
    """Write report.json and the plots to ``output``, which appears complete or not at all.

    Without matplotlib no plots are written, and a warning is logged.

    Raises:
        OutputError: if something is in the way at ``output``, or it cannot be written.

    """
    _save(report, REPORT, lambda place: write_plots(report, place), output, overwrite)


def save_comparison(comparison: Comparison, output: Path, *, overwrite: bool = False) -> None:
    """Write comparison.json and its plot to ``output``; see ``save_report``."""
    _save(
        comparison,
        COMPARISON,
        lambda place: write_comparison_plots(comparison, place),
        output,
        overwrite,
    )


def _save(
    content: Report | Comparison,
    marker: Marker,
    write: Callable[[Path], object],
    output: Path,
    overwrite: bool,
) -> None:
    with staged_directory(output, overwrite=overwrite, marker=marker) as staging:
        (staging / marker.file).write_text(content.model_dump_json(indent=2) + "\n", "utf-8")
        try:
            write(staging)
        except ImportError:
            logger.warning(
                "The report has no plots, since matplotlib is not installed: pip install matplotlib"
            )
    logger.success(f"Saved to: {output}")
