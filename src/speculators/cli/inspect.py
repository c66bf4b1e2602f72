"""`speculators inspect`: what a checkpoint is, and what can be done with it."""

from typing import Annotated

import typer

from speculators.cli.shared import CacheDir

__all__ = ["inspect"]


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_ID",
            help="The checkpoint: a directory, a file of weights in one, or a Hugging Face id.",
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as docs/inspect.md describes it.")
    ] = False,
    cache_dir: CacheDir = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, tag or commit on the Hub.", show_default=False),
    ] = None,
) -> None:
    """Say what a checkpoint is, on what evidence, and what can be done with it.

    Reads config.json and the headers of the weight files, and downloads no
    weights from the Hub. The status is 1 if the kind of checkpoint is not known.

    For example:

    speculators inspect ./draft

    speculators inspect yuhuili/EAGLE-LLaMA3.1-Instruct-8B --json
    """
    from speculators.checkpoint.hub.access import HubAccess
    from speculators.cli.inspect_view import print_finding
    from speculators.cli.printing import printed
    from speculators.errors import CheckpointError, SpeculatorsError
    from speculators.inspection.checkpoint import inspect_checkpoint, unreadable

    with printed(as_json) as printing:
        try:
            finding = inspect_checkpoint(source, HubAccess(cache_dir), revision=revision)
        except SpeculatorsError as error:
            printing.result = unreadable(source, error)
            raise
        printing.result = finding
        if not as_json:
            print_finding(finding)
        if finding.kind == "unknown":
            raise CheckpointError(finding.conversion.why_not)
