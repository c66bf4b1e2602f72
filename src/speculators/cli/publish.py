"""`speculators publish`: a converted checkpoint, uploaded to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from speculators.cli.shared import CacheDir

__all__ = ["publish"]


def publish(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="A directory that `convert` created.")
    ],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="The repository, as organization/name; created if needed."
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Keep the repository private.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="A report of `speculators evaluate`, for the model card.", show_default=False
        ),
    ] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Check a converted checkpoint again, and upload it to the Hugging Face Hub.

    It gets a model card (README.md), unless you have written one. The access
    token is taken from HF_TOKEN, or from where `hf auth login` put it.

    For example:

    speculators publish ./converted my-organization/eagle-llama-3.1-8b --report ./report
    """
    from speculators.cli.progress import progress_bar
    from speculators.convert.conversion import validate
    from speculators.publish.draft import check_publishing, publish_draft

    check_publishing(repo, report)
    with progress_bar() as progress:
        validate(output, cache_dir=cache_dir, progress=progress)
    publish_draft(output, repo, private=private, report=report)
