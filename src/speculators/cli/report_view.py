"""How an evaluation's progress and its report are shown."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from loguru import logger
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from speculators.cli.output import bordered, show
from speculators.cli.shared import is_quiet
from speculators.errors import visible
from speculators.evaluate.metrics import acceptance_length, total
from speculators.evaluate.recording.manifest import RecordedPrompt
from speculators.evaluate.report import (
    Comparison,
    PromptResult,
    ProposalResult,
    Report,
    Served,
    Summary,
)

__all__ = ["print_comparison", "print_report", "progress_bar", "recording_bar"]

DIFFERENCES_SHOWN = 10


@contextmanager
def progress_bar(prompts: int) -> Iterator[Callable[[PromptResult], None]]:
    """A bar on standard error, advanced by each prompt's result.

    Where standard error is not a terminal, a line is logged for each prompt; with --quiet, nothing
    is shown.
    """
    measured: list[PromptResult] = []
    with _bar("Measuring", prompts) as bar:

        def advance(result: PromptResult) -> None:
            measured.append(result)
            length = _number(_length_of(measured))
            bar.update(TaskID(0), advance=1, description=f"Acceptance length {length}")
            if not _is_shown():
                of_prompt = _length_of([result])
                found = (
                    f"{result.speculative[0].new_tokens} new tokens"
                    if of_prompt is None
                    else f"acceptance length {_number(of_prompt)}, so far {length}"
                )
                logger.info(
                    f"{len(measured)} of {prompts}: prompt {result.id} ({result.category}), {found}"
                )

        yield advance


@contextmanager
def recording_bar(
    prompts: int,
) -> Iterator[tuple[Callable[[float], None], Callable[[RecordedPrompt], None]]]:
    """A bar on standard error, as ``progress_bar``.

    It is advanced by shares of a prompt; the other function is called with each prompt that was
    recorded.
    """
    recorded = 0
    with _bar("Recording", prompts) as bar:

        def moved(share: float) -> None:
            bar.update(TaskID(0), advance=share)

        def done(prompt: RecordedPrompt) -> None:
            nonlocal recorded
            recorded += 1
            if not _is_shown():
                logger.info(
                    f"{recorded} of {prompts}: prompt {prompt.id} ({prompt.category}), "
                    f"{prompt.new_tokens} new tokens"
                )

        yield moved, done


def _is_shown() -> bool:
    return not is_quiet() and Console(stderr=True).is_terminal


def _bar(name: str, prompts: int) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not _is_shown(),
    )
    bar.add_task(name, total=prompts)
    return bar


def _length_of(prompts: Iterable[PromptResult]) -> float | None:
    runs = (run.acceptance for prompt in prompts for run in prompt.speculative)
    return acceptance_length(total(counts for counts in runs if counts is not None))


def print_comparison(comparison: Comparison) -> None:
    """Print the acceptance lengths of several drafts, and their acceptance by position."""
    reports = comparison.drafts
    longest = [report.longest for report in reports]
    deepest = max(len(result.overall.acceptance_rates) for result in longest)
    lengths = bordered("draft", "proposal", *_numbers("draft tokens", "acceptance length"))
    for report in reports:
        for result in report.results:
            lengths.add_row(
                visible(report.draft),
                result.proposal.proposal_type,
                str(result.proposal.speculative_tokens),
                _number(result.overall.acceptance_length),
                end_section=result is report.results[-1],
            )
    positions = bordered("draft", *_numbers(*map(str, range(1, deepest + 1))))
    categories = dict.fromkeys(name for result in longest for name in result.categories)
    by_category = bordered("draft", *_numbers(*map(visible, categories), "overall"))
    for report, result in zip(reports, longest, strict=True):
        rates = result.overall.acceptance_rates
        positions.add_row(visible(report.draft), *map(_number, rates))
        by_category.add_row(
            visible(report.draft),
            *(
                _number(result.categories[name].acceptance_length)
                if name in result.categories
                else "-"
                for name in categories
            ),
            _number(result.overall.acceptance_length),
        )
    show(
        f"{len(reports)} drafts for {reports[0].verifier}",
        lengths,
        f"Acceptance by position, of all steps ({longest[0].name})",
        positions,
        f"Acceptance length by category ({longest[0].name})",
        by_category,
        *_how(reports[0]),
    )


def print_report(report: Report) -> None:
    """Print the figures by draft length, position and category, and which outputs differed."""
    longest, shown = report.longest, report.shown
    show(
        f"{report.draft}, drafting for {report.verifier}",
        _by_draft(report.results),
        f"Acceptance by position ({longest.name})",
        _by_position(longest.overall),
        f"By category ({shown.name})",
        _by_category(shown),
        *_sentences(report),
    )


def _by_draft(results: Iterable[ProposalResult]) -> Table:
    table = bordered(
        "proposal",
        *_numbers("draft tokens", "acceptance length", "tokens/s", "speed-up", "identical"),
    )
    for result in results:
        overall = result.overall
        table.add_row(
            result.proposal.proposal_type,
            str(result.proposal.speculative_tokens),
            _number(overall.acceptance_length),
            _number(overall.tokens_per_second, 1),
            _number(overall.speedup),
            _identical(overall),
        )
    return table


def _by_position(summary: Summary) -> Table:
    table = bordered(
        *_numbers("position", "accepted, of all steps", "of the steps that accepted all before")
    )
    rows = zip(summary.acceptance_rates, summary.conditional_acceptance_rates, strict=True)
    for position, (rate, conditional) in enumerate(rows, start=1):
        table.add_row(str(position), _number(rate), _number(conditional))
    return table


def _by_category(result: ProposalResult) -> Table:
    table = bordered(
        "category",
        *_numbers("prompts", "acceptance length", "tokens/s", "speed-up", "identical"),
    )

    def add(name: str, summary: Summary, *, end_section: bool = False) -> None:
        table.add_row(
            name,
            str(summary.prompts),
            _number(summary.acceptance_length),
            _number(summary.tokens_per_second, 1),
            _number(summary.speedup),
            _identical(summary),
            end_section=end_section,
        )

    last = next(reversed(result.categories))
    for category, summary in result.categories.items():
        add(category, summary, end_section=category == last)
    add("overall", result.overall)
    return table


def _how(report: Report) -> Iterator[str]:
    settings, environment = report.settings, report.environment
    decoding = (
        f"temperature {settings.temperature:g}" if settings.temperature else "greedy decoding"
    )
    if settings.top_p < 1 and settings.temperature:
        decoding += f" and top-p {settings.top_p:g}"
    plain = report.longest.overall.plain_tokens_per_second  # the same for all drafts
    yield (
        f"{decoding.capitalize()}, up to {settings.max_new_tokens} new tokens, "
        f"{environment.where}"
        + ("." if plain is None else f"; without a draft {_number(plain, 1)} tokens/s.")
    )
    if isinstance(environment, Served):
        yield f"Served at {environment.url}, with a concurrency of {settings.concurrency}."
    if settings.recording is not None:
        yield f"Scored on the texts in {settings.recording}, without the verifier."
    if not report.chat_template:
        yield "The verifier has no chat template: the prompts were given as plain text."


def _sentences(report: Report) -> Iterator[str]:
    yield from _how(report)
    differing = [
        (result.proposal.speculative_tokens, prompt.id, run.difference)
        for index, result in enumerate(report.results)
        for prompt in report.prompts
        for run in [prompt.speculative[index]]
        if run.difference is not None
    ]
    for tokens, prompt, difference in differing[:DIFFERENCES_SHOWN]:
        yield (
            f"Prompt {prompt}, draft of {tokens}: new token {difference.position + 1} is "
            f"{_token(difference.speculative)}, by plain decoding {_token(difference.plain)}."
        )
    if len(differing) > DIFFERENCES_SHOWN:
        yield f"{len(differing) - DIFFERENCES_SHOWN} more outputs differ; report.json has them all."
    if recommendation := report.recommendation:
        yield (
            f"Recommended draft length: {recommendation.speculative_tokens}, speed-up "
            f"{recommendation.speedup:.2f} ({recommendation.rule})."
        )
        if recommendation.speedup < 1:
            yield "Here no draft is faster than the verifier alone."
    if not report.complete:
        yield f"Stopped after {len(report.prompts)} of {report.settings.prompts_total} prompts."


def _numbers(*heads: str) -> list[Column]:
    return [Column(head, justify="right", overflow="fold") for head in heads]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _identical(summary: Summary) -> str:
    return "-" if summary.identical is None else f"{summary.identical} of {summary.prompts}"


def _token(token: int | None) -> str:
    return "the end" if token is None else str(token)
