"""`speculators batch`: many conversions, and the table of their outcomes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speculators.cli.shared import CacheDir, keep_blas_to_one_thread
from speculators.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from speculators.batch.run import Outcome
    from speculators.families.family import Family

__all__ = ["batch", "run_batch"]


def batch(
    manifest: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A YAML or JSON file with a list of conversions: the manifest."
        ),
    ],
    jobs: Annotated[int, typer.Option(min=1, help="How many conversions run at a time.")] = 1,
    family_name: Annotated[
        str | None,
        typer.Option(
            "--family",
            help="The family that all drafts have to belong to, such as eagle. By default each "
            "may be of any.",
            show_default=False,
        ),
    ] = None,
    cache_dir: CacheDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is done already, and convert nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as docs/batch.md describes it.")
    ] = False,
) -> None:
    """Convert many drafts, those that are not done yet, and list what became of each.

    The failure of one does not stop the others; the status is then 1.

    For example:

    speculators batch batch.yaml --jobs 2
    """
    from speculators.families.registry import families, family_named

    family = family_named(family_name)
    if family_name is not None and family is None:
        names = [it.name for it in families()]
        raise typer.BadParameter(
            f"{family_name!r} is not one of {', '.join(names)}{did_you_mean(family_name, names)}.",
            param_hint="--family",
        )
    run_batch(manifest, family, jobs=jobs, cache_dir=cache_dir, dry_run=dry_run, as_json=as_json)


def run_batch(
    manifest: Path,
    family: "Family | None",
    *,
    jobs: int,
    cache_dir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a manifest, or with ``dry_run`` only find what is done; exit with 1 if any failed."""
    from speculators.batch.manifest import read_manifest
    from speculators.batch.run import Batch, State
    from speculators.cli.printing import printed
    from speculators.cli.results import BatchResult

    result = BatchResult(manifest=str(manifest))
    keep_blas_to_one_thread()
    with printed(as_json, result):
        run = Batch(read_manifest(manifest, family), jobs=jobs, cache_dir=cache_dir)
        try:
            if dry_run:
                run.find_done()
            else:
                run.run()
        finally:  # also when it was stopped
            result.tell(run.outcomes)
            if not as_json:
                _print(run.outcomes)
        failed = sum(outcome.state is State.FAILED for outcome in run.outcomes)
        if failed:
            result.fail(f"{failed} of {len(run.outcomes)} entries failed.")
    if failed:
        raise typer.Exit(1)


def _print(outcomes: "Sequence[Outcome]") -> None:
    """Print a line for each entry, and how many entries are in each state."""
    from collections import Counter

    from speculators.batch.run import State
    from speculators.cli.output import Listing, show

    counts = Counter(outcome.state for outcome in outcomes)
    rows = (
        (
            str(number),
            _shown(outcome.conversion.output),
            outcome.state.value,
            f"{outcome.seconds:.1f}" if outcome.seconds else "",
            outcome.error or outcome.url or "",
        )
        for number, outcome in enumerate(outcomes, start=1)
    )
    show(
        Listing(("entry", "output", "outcome", "seconds", "error or URL"), rows),
        "",
        ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state]) + ".",
    )


def _shown(output: Path) -> str:
    """A path relative to the working directory if it is within that, else as it is."""
    here = Path.cwd()
    return str(output.relative_to(here) if here in output.parents else output)
