"""`speculators validate`: a converted checkpoint, checked again."""

from typing import Annotated

import typer

from speculators.cli.shared import CacheDir, keep_blas_to_one_thread

__all__ = ["validate"]


def validate(
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT", help="A converted draft: a directory or a Hugging Face id."
        ),
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as docs/cli.md describes it.")
    ] = False,
) -> None:
    """Check a converted checkpoint again, at any time; nothing is written.

    Its files must be those that its conversion.json records, and the draft must
    load and compute what its tensors say. With --source, everything that
    `convert` proves is proven again.

    For example:

    speculators validate ./converted

    speculators validate ./converted --source ./draft
    """
    if revision is not None and source is None:
        raise typer.BadParameter("--revision only works with --source.")

    from speculators.cli.printing import printed
    from speculators.cli.progress import progress_bar
    from speculators.cli.results import ValidateResult
    from speculators.convert import conversion

    result = ValidateResult(output=output, source=source)
    keep_blas_to_one_thread()
    with printed(as_json, result), progress_bar() as progress:
        proof = conversion.validate(
            output, source, cache_dir=cache_dir, revision=revision, progress=progress
        )
        result.proven, result.left_open = proof.proven, proof.left_open
