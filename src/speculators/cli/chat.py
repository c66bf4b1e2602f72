"""`speculators chat`: talk to the verifier, and see what its draft gets right."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speculators.cli.decoding import (
    Device,
    ProposalType,
    RunDType,
    VerifierName,
    dtype_name,
)
from speculators.cli.shared import CacheDir, Revision

if TYPE_CHECKING:
    from speculators.chat.answer import Answer

__all__ = ["chat"]


def chat(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="The converted draft: a directory or a Hugging Face id."
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Answer this, and end. Without it, lines are read from the terminal until Ctrl-D, "
            "or all of standard input is one prompt.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system message to begin with.", show_default=False)
    ] = None,
    verifier: VerifierName = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page that shows each step: what was proposed, and what was accepted.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --trace: replace the file if it exists.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The longest answer, in tokens.")
    ] = 512,
    proposal: ProposalType = None,
    num_draft_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="How many tokens to draft per verification step. By default as the draft's config "
            "says.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="For sampling from the verifier's whole distribution; 0 means greedy decoding.",
        ),
    ] = 0.0,
    dtype: RunDType = "auto",
    device: Device = None,
    cache_dir: CacheDir = None,
    revision: Revision = None,
) -> None:
    """Talk to the verifier, and see which tokens its draft got right.

    The text appears as it is decoded: in green what the draft proposed and the
    verifier accepted, the rest plain.

    For example:

    speculators chat ./converted --prompt "Why is the sky blue?" --trace sky.html
    """
    from speculators.errors import OutputError

    if "" in (prompt, system):
        raise typer.BadParameter("--prompt and --system take a text that is not empty.")
    if overwrite and trace is None:
        raise typer.BadParameter("--overwrite only works with --trace.")
    if trace is not None and trace.exists() and not (overwrite and trace.is_file()):
        raise OutputError(f"{trace} exists; give another --trace, or --overwrite to replace it.")
    if trace is not None and not trace.parent.is_dir():
        raise OutputError(f"{trace} cannot be written: {trace.parent} is not a directory.")
    prompts = _prompts(prompt)

    from rich.console import Console
    from rich.text import Text

    from speculators.checkpoint.hub.access import HubAccess
    from speculators.evaluate.subject.opening import check_device, open_draft, proposals_of

    check_device(device)
    opened = open_draft(directory, HubAccess(cache_dir), revision=revision, verifier=verifier)
    [method] = proposals_of(opened.converted, proposal, [num_draft_tokens])

    from speculators.chat.session import Session
    from speculators.evaluate.subject.loading import load_subject

    subject = load_subject(opened, dtype=dtype_name(dtype), device=device)
    session = Session(
        subject, method, system=system, max_new_tokens=max_new_tokens, temperature=temperature
    )
    console = Console(highlight=False, soft_wrap=True)
    try:
        for said in prompts:
            try:
                answer = session.answer(
                    said,
                    lambda piece: console.print(
                        Text(piece.text, style="green" if piece.drafted else ""), end=""
                    ),
                )
            finally:
                console.print()  # what is said of an interruption begins a line
            console.print(_summary(answer), style="dim")
    finally:  # also when the conversation was interrupted
        if trace is not None and (answers := [it for it in session.answers if it.steps]):
            _write_trace(trace, subject.name, subject.verifier.name, answers)


def _prompts(given: str | None) -> Iterator[str]:
    """What to answer: the one given, each line typed, or all of standard input."""
    if given is not None:
        yield given
    elif not sys.stdin.isatty():
        said = sys.stdin.read().strip()
        if not said:
            raise typer.BadParameter(
                "Standard input is empty, and without --prompt it is the prompt."
            )
        yield said
    else:
        import readline  # noqa: F401  (lets input() edit lines)

        while True:
            try:
                said = input("> ").strip()
            except EOFError:
                print()
                return
            if said:
                yield said


def _summary(answer: "Answer") -> str:
    parts = [f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.1f} per second"]
    if (length := answer.acceptance_length) is not None:
        # In the last step, accepted tokens may lie beyond the end.
        drafted = sum(min(step.accepted, step.added) for step in answer.steps)
        parts.append(f"acceptance length {length:.2f}, {drafted} of them drafted")
    return "; ".join(parts)


def _write_trace(file: Path, draft: str, verifier: str, answers: "list[Answer]") -> None:
    from loguru import logger

    from speculators.chat.trace import trace_page
    from speculators.errors import OutputError

    page = trace_page(f"What {draft} drafted", [("draft", draft), ("verifier", verifier)], answers)
    unfinished = file.with_name(f".{file.name}.part")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}.") from error
    logger.success(f"Saved to: {file}")
