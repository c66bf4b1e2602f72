"""`speculators publish`: a converted checkpoint, uploaded to the Hugging Face Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speculators.cli.shared import CacheDir, keep_blas_to_one_thread

if TYPE_CHECKING:
    from speculators.publish.draft import Publication

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
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH",
            help="The branch to commit to, created if needed; by default main.",
            show_default=False,
        ),
    ] = None,
    commit_message: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="The first line of the commit message.", show_default=False
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print which files and what card would be uploaded, and upload nothing; this "
            "needs no access token.",
        ),
    ] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Check a converted checkpoint again, and upload it to the Hugging Face Hub.

    Its model card (README.md) is written anew for REPO, unless you have edited
    it. The access token is taken from HF_TOKEN, or from where `hf auth login`
    put it.

    For example:

    speculators publish ./converted my-organization/my-draft --dry-run

    speculators publish ./converted my-organization/my-draft --report report
    """
    from loguru import logger

    from speculators.cli.progress import progress_bar
    from speculators.convert.conversion import validate
    from speculators.publish.draft import check_publishing, plan_publication, publish_draft

    keep_blas_to_one_thread()
    check_publishing(repo, report, directory=output, revision=revision, with_token=not dry_run)
    with progress_bar() as progress:
        validate(output, cache_dir=cache_dir, progress=progress)
    if dry_run:
        publication = plan_publication(output, repo, report=report)
        for warning in publication.warnings:
            logger.warning(warning)
        _print(publication, repo, revision)
        return
    publish_draft(
        output,
        repo,
        private=private,
        report=report,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )


def _print(publication: "Publication", repo: str, revision: str | None) -> None:
    """Print what would be uploaded."""
    from rich.filesize import decimal

    from speculators.cli.output import Listing, show

    show(
        f"To {repo}{f' (branch {revision})' if revision else ''}:",
        "",
        Listing(("file", "size"), ((it, decimal(n)) for it, n in publication.files.items())),
        "",
        "README.md:",
        "",
        publication.card.rstrip(),
        "",
        "Nothing was uploaded.",
    )
