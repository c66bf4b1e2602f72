"""A report as a directory: report.json and the plots."""

from pathlib import Path

from loguru import logger

from speculators.checkpoint.output.staging import Marker, staged_directory
from speculators.evaluate.plots import write_plots
from speculators.evaluate.report import REPORT_FILE, Report

__all__ = ["REPORT", "save_report"]

REPORT = Marker("a report of speculators", REPORT_FILE, "speculators_report")


def save_report(report: Report, output: Path, *, overwrite: bool = False) -> None:
    """Write report.json and the plots to ``output``, which appears complete or not at all.

    Without matplotlib no plots are written, and a warning is logged.

    Raises:
        OutputError: if something is in the way at ``output``, or it cannot be written.

    """
    with staged_directory(output, overwrite=overwrite, marker=REPORT) as staging:
        (staging / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", "utf-8")
        try:
            write_plots(report, staging)
        except ImportError:
            logger.warning(
                "The report has no plots, since matplotlib is not installed: pip install matplotlib"
            )
    logger.success(f"Saved to: {output}")
