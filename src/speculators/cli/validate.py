"""`speculators validate`: a converted checkpoint, checked again."""

from pathlib import Path
from typing import Annotated

import typer

from speculators.cli.shared import CacheDir

__all__ = ["validate"]


def validate(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="A directory that `convert` made.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="INPUT",
            help="What it was converted from: a directory or a Hugging Face id.",
            show_default=False,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="With --source: a branch, tag or commit of INPUT on the Hub.", show_default=False
        ),
    ] = None,
) -> None:
    """Check a converted checkpoint again, at any time; nothing is written.

    Its files have to be those that its conversion.json tells of, and the draft
    has to load and compute what its tensors say. With --source, everything is
    proven that `convert` proves.

    For example:

    speculators validate ./converted

    speculators validate ./converted --source ./draft
    """
    if revision is not None and source is None:
        raise typer.BadParameter("--revision is of use with --source only.")

    from speculators.cli.progress import progress_bar
    from speculators.convert.eagle import EagleConverter

    with progress_bar() as progress:
        EagleConverter().validate(
            output, source, cache_dir=cache_dir, revision=revision, progress=progress
        )
