"""The figures of an evaluation, as a section of a model card."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError as PydanticValidationError

from speculators.errors import EvaluationError
from speculators.evaluate.report import REPORT_FILE, ProposalResult, Report
from speculators.format.problems import first_problem

__all__ = ["evaluation_section", "read_report"]


def read_report(path: Path) -> Report:
    """Read the report that `speculators evaluate` wrote.

    Args:
        path: the directory that it created, or the report.json in it.

    Raises:
        EvaluationError: if it cannot be read or is not a report.

    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise EvaluationError(
            f"{file} cannot be read ({error.strerror}); give what 'speculators evaluate' wrote."
        ) from error
    except PydanticValidationError as error:
        raise EvaluationError(
            f"{file} is not a report of 'speculators evaluate': {first_problem(error)}."
        ) from error


def evaluation_section(report: Report) -> str:
    """Describe in Markdown what was measured, and how."""
    return "\n".join([" ".join(_how(report)), "", *_table(report.results)]) + "\n"


def _how(report: Report) -> Iterator[str]:
    settings, environment = report.settings, report.environment
    decoding = f"at temperature {settings.temperature:g}" if settings.temperature else "greedily"
    own = " that come with speculators" if settings.prompts_file is None else ""
    yield f"Measured by speculators {report.speculators_version}"
    yield f"on {len(report.prompts)} prompts{own},"
    yield f"decoding {decoding} up to {settings.max_new_tokens} new tokens,"
    yield f"{environment.conditions}; the speeds hold for that only."
    yield "The acceptance length is the mean number of tokens that one pass of the verifier gives."
    if not report.complete:
        yield f"The run was stopped before all {settings.prompts_total} prompts were measured."


HEADS = ("draft tokens", "acceptance length", "tokens/s", "verifier alone", "speed-up", "identical")


def _table(results: list[ProposalResult]) -> Iterator[str]:
    yield f"| proposal | {' | '.join(HEADS)} |"
    yield "| --- |" + " ---: |" * len(HEADS)
    for result in results:
        overall = result.overall
        identical = "-" if overall.identical is None else f"{overall.identical}/{overall.prompts}"
        cells = [
            result.proposal.proposal_type,
            str(result.proposal.speculative_tokens),
            _number(overall.acceptance_length, 2),
            _number(overall.tokens_per_second, 1),
            _number(overall.plain_tokens_per_second, 1),
            _number(overall.speedup, 2),
            identical,
        ]
        yield f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
