"""A report as a directory: report.json and the plots."""

from pathlib import Path

from loguru import logger

from speculators.checkpoint.staging import Kind, staged_directory
from speculators.evaluate.plots import write_plots
from speculators.evaluate.report import REPORT_FILE, Report

__all__ = ["REPORT", "save_report"]

REPORT = Kind("a report of speculators", REPORT_FILE, "speculators_report")


def save_report(report: Report, output: Path, *, overwrite: bool = False) -> None:
    """Make ``output`` with report.json and the plots; it appears complete or not at all.

    Without matplotlib there are no plots, and the log says so.

    Raises:
        OutputError: if something is in the way, or the disk does not take it.

    """
    with staged_directory(output, overwrite=overwrite, kind=REPORT) as staging:
        (staging / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", "utf-8")
        try:
            write_plots(report, staging)
        except ImportError:
            logger.warning(
                "The report has no plots, since matplotlib is not installed: "
                "pip install 'speculators[evaluate]'"
            )
    logger.success(f"Saved to: {output}")
