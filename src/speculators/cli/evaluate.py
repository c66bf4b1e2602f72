"""`speculators evaluate`: how well a draft drafts."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from speculators.cli.decoding import (
    Device,
    Limit,
    MaxNewTokens,
    Prompts,
    ProposalType,
    RunDType,
    Seed,
    Temperature,
    TopP,
    VerifierName,
    dtype_name,
    read_selected,
    settings_of,
)
from speculators.cli.shared import CacheDir, Revision

if TYPE_CHECKING:
    from speculators.checkpoint.hub.access import HubAccess
    from speculators.cli.printing import Printing
    from speculators.evaluate.prompts import Prompt
    from speculators.evaluate.recording.manifest import Recording
    from speculators.evaluate.report import PromptResult, Report, Settings

__all__ = ["evaluate"]

CONCURRENCY = 8


def evaluate(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR",
            help="The converted draft, or the MTP that was cut out of a verifier: a directory or a "
            "Hugging Face id; with --recording, several are compared.",
        ),
    ],
    verifier: VerifierName = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Score on the texts that 'speculators record' wrote, without the verifier. Its "
            "prompts and settings are used.",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure the draft where vLLM serves it, at this address; the server's own draft "
            "length is measured.",
            show_default=False,
        ),
    ] = None,
    baseline_server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="With --server: one that serves the verifier alone, to compare with.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --server: how many prompts are answered at the same time.",
            show_default=str(CONCURRENCY),
        ),
    ] = None,
    prompts: Prompts = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    proposal: ProposalType = None,
    num_draft_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="K|A..B|K,L,...",
            help="How many tokens to draft per verification step; a range such as 1..8, or a list "
            "such as 1,3,5, measures each length and recommends one. By default as the draft's "
            "config says.",
            show_default=False,
        ),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    acceptance_only: Annotated[
        bool,
        typer.Option(
            "--acceptance-only",
            help="Skip plain decoding: no speed-up is measured and no outputs are compared.",
        ),
    ] = False,
    dtype: RunDType = "auto",
    device: Device = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the report as JSON, as docs/evaluation.md describes."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="A directory to create, for report.json and plots.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --output: replace it if it is a report.")
    ] = False,
) -> None:
    """Measure acceptance and speed of a converted draft, and compare with plain decoding.

    Ctrl-C stops it; what was measured so far is still reported.

    For example:

    speculators evaluate ./converted --num-draft-tokens 1..8 --output report
    """
    several = len(directories) > 1
    lengths = _draft_lengths(num_draft_tokens)
    if several:
        _check_comparison(recording, revision)
    if overwrite and output is None:
        raise typer.BadParameter("--overwrite only works with --output.")
    _check_server_options(
        server,
        {"--baseline-server": baseline_server, "--concurrency": concurrency},
        {
            "--recording": recording,
            "--verifier": verifier,
            "--proposal": proposal,
            "--num-draft-tokens": num_draft_tokens,
            "--device": device,
            "--dtype": None if dtype == "auto" else dtype,
        },
    )

    from speculators.checkpoint.hub.access import HubAccess
    from speculators.checkpoint.output.staging import check_output
    from speculators.cli.printing import printed
    from speculators.evaluate.files import COMPARISON, REPORT
    from speculators.evaluate.subject.opening import check_device

    with printed(as_json) as printing:
        if output is not None:
            check_output(output, overwrite=overwrite, marker=COMPARISON if several else REPORT)
        check_device(device)
        wanted = Wanted(
            HubAccess(cache_dir), revision, verifier, proposal, lengths, device, dtype_name(dtype)
        )
        measurements: Iterable[Measurement]
        if recording is not None:
            from speculators.evaluate.recording.manifest import open_recording

            found = open_recording(recording)
            given = None if prompts is None and limit is None else read_selected(prompts, limit)
            found.check_settings(
                given,
                limit=None if given is None else len(given),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                dtype=None if wanted.dtype == "auto" else wanted.dtype,
            )
            total = len(found.manifest.prompts)
            measurements = _on_recording(directories, found, wanted)
        else:
            selected = read_selected(prompts, limit)
            total = len(selected)
            settings = settings_of(selected, prompts, max_new_tokens, temperature, top_p, seed)
            if server is not None:
                baseline = None if acceptance_only else baseline_server
                settings = settings.model_copy(update={"concurrency": concurrency or CONCURRENCY})
                measurements = [
                    _served(directories[0], server, baseline, selected, settings, wanted)
                ]
            else:
                settings = settings.model_copy(update={"acceptance_only": acceptance_only})
                measurements = [_decoding(directories[0], selected, settings, wanted)]

        with _reporting(printing, several, as_json, output, overwrite) as reports:
            for measurement in measurements:
                _measure(measurement, total, reports)


class Measurement(Protocol):
    """Something that measures a draft, and can be stopped and reported on after any prompt."""

    measured: "list[PromptResult]"

    def run(self) -> "Iterator[PromptResult]":
        """Measure prompt by prompt."""

    def report(self) -> "Report":
        """The report on what has been measured so far."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How drafts are to be opened and run.

    Attributes:
        hub: the cache and the token.
        revision: of the draft on the Hub.
        verifier: a directory or a Hugging Face id; the one that the draft names if not given.
        proposal: how to propose tokens; as the draft says if not given.
        lengths: how many tokens to draft; [None] for the proposal method's default.
        device: by torch's name.
        dtype: by torch's name, or ``auto``.

    """

    hub: "HubAccess"
    revision: str | None
    verifier: str | None
    proposal: str | None
    lengths: Sequence[int | None]
    device: str | None
    dtype: str


def _on_recording(
    directories: Sequence[str], recording: "Recording", wanted: Wanted
) -> Iterator[Measurement]:
    """Scores of drafts on a recording.

    All drafts are opened and checked at once; each is loaded when it comes up.
    """
    from speculators.evaluate.recording.opening import open_scored
    from speculators.evaluate.subject.opening import proposals_of

    drafts = [
        open_scored(
            it, recording, hub=wanted.hub, revision=wanted.revision, verifier=wanted.verifier
        )
        for it in directories
    ]
    methods = [proposals_of(it.converted, wanted.proposal, wanted.lengths) for it in drafts]

    from speculators.evaluate.recording.scoring import Scoring, load_scored

    return (
        Scoring(draft, load_scored(draft, recording, wanted.device), recording, proposals)
        for draft, proposals in zip(drafts, methods, strict=True)
    )


def _served(
    directory: str,
    server: str,
    baseline: str | None,
    prompts: "Sequence[Prompt]",
    settings: "Settings",
    wanted: Wanted,
) -> Measurement:
    """The evaluation of a draft on the server that drafts with it."""
    from speculators.evaluate.server.client import Server
    from speculators.evaluate.server.evaluation import ServedEvaluation
    from speculators.evaluate.subject.opening import find_draft

    found = find_draft(directory, wanted.hub, revision=wanted.revision)
    return ServedEvaluation(
        directory,
        found.repository.commit,
        Server(server),
        None if baseline is None else Server(baseline),
        prompts,
        settings,
    )


def _decoding(
    directory: str, prompts: "Sequence[Prompt]", settings: "Settings", wanted: Wanted
) -> Measurement:
    """The evaluation of a draft by decoding with it here."""
    from speculators.evaluate.subject.mtp import mtp_proposals
    from speculators.evaluate.subject.opening import Opened, open_subject, proposals_of

    opened = open_subject(directory, wanted.hub, revision=wanted.revision, verifier=wanted.verifier)
    proposals = (
        proposals_of(opened.converted, wanted.proposal, wanted.lengths)
        if isinstance(opened, Opened)
        else mtp_proposals(wanted.proposal, wanted.lengths)
    )

    from speculators.evaluate.evaluation import Evaluation
    from speculators.evaluate.subject.loading import load_subject

    subject = load_subject(opened, dtype=wanted.dtype, device=wanted.device)
    return Evaluation(subject, prompts, proposals, settings)


def _check_comparison(recording: Path | None, revision: str | None) -> None:
    """Refuse to compare drafts other than on the same texts."""
    if recording is None or revision is not None:
        raise typer.BadParameter(
            "Several drafts are compared on the same texts: give --recording, which 'speculators "
            "record' writes, and no --revision."
        )


def _check_server_options(
    server: str | None, only_with: dict[str, object], never_with: dict[str, object]
) -> None:
    """Refuse options that only work with a server, or only without one."""
    for option, value in (only_with if server is None else never_with).items():
        if value is not None:
            raise typer.BadParameter(
                f"{option} only works with --server."
                if server is None
                else f"{option} does not work with --server, whose settings are used."
            )


def _measure(measurement: Measurement, prompts: int, reports: "list[Report]") -> None:
    """Run a measurement, and add its report even if it is stopped, or fails."""
    from speculators.cli.printing import message
    from speculators.cli.report_view import progress_bar

    failure: str | None = None
    try:
        with progress_bar(prompts) as advance:
            for result in measurement.run():
                advance(result)
    except BaseException as error:
        failure = message(error)
        raise
    finally:
        if measurement.measured:
            reports.append(measurement.report())
            if failure is not None:
                reports[-1].fail(failure)


@contextmanager
def _reporting(
    printing: "Printing", several: bool, as_json: bool, output: Path | None, overwrite: bool
) -> Iterator["list[Report]"]:
    """Print and save at the end what was measured; nothing of it is lost.

    Yields a list, for the reports.

    Args:
        printing: gets what was measured, to be printed as JSON.
        several: whether drafts are compared.
        as_json: leave printing to ``printing``.
        output: where to save it, if anywhere.
        overwrite: whether to replace what is there.

    """
    from speculators.cli.printing import message
    from speculators.cli.report_view import print_comparison, print_report
    from speculators.evaluate.files import save_comparison, save_report
    from speculators.evaluate.report import Comparison

    reports: list[Report] = []
    failure: str | None = None
    try:
        yield reports
    except BaseException as error:
        failure = message(error)
        raise
    finally:
        if reports:
            comparison = Comparison(drafts=reports)
            printing.result = comparison if several else reports[0]
            printing.result.warnings = [*printing.warnings]
            if failure is not None:
                printing.result.fail(failure)
            try:
                if not as_json and several:
                    print_comparison(comparison)
                elif not as_json:
                    print_report(reports[0])
            finally:  # even if nobody reads what is printed
                if output is not None and several:
                    save_comparison(comparison, output, overwrite=overwrite)
                elif output is not None:
                    save_report(reports[0], output, overwrite=overwrite)


def _draft_lengths(text: str | None) -> list[int] | list[None]:
    """Parse ``4`` to [4], ``1..3`` to [1, 2, 3], ``1,3,5`` to [1, 3, 5]; they can be combined.

    [None], without a text, is the proposal method's default.
    """
    if text is None:
        return [None]
    lengths: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise typer.BadParameter(
                f"{text!r} is neither a number of tokens, such as 4, nor a range, such as 1..8, "
                "nor a list, such as 1,3,5.",
                param_hint="--num-draft-tokens",
            )
        lengths |= {*range(first, last + 1)}
    return sorted(lengths)
