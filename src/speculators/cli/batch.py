"""`speculators convert FAMILY --manifest`: many conversions, and the table of their outcomes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import typer

from speculators.batch.manifest import read_manifest
from speculators.batch.run import Batch, Outcome, State
from speculators.cli.output import Listing, show
from speculators.families.family import Family

__all__ = ["run_batch"]


def run_batch(
    manifest: Path, family: Family | None, *, jobs: int, cache_dir: Path | None, dry_run: bool
) -> None:
    """Run a manifest, or with ``dry_run`` only find what is done; exit with 1 if any failed."""
    batch = Batch(read_manifest(manifest, family), jobs=jobs, cache_dir=cache_dir)
    try:
        if dry_run:
            batch.find_done()
        else:
            batch.run()
    finally:  # also when it was stopped
        _print(batch.outcomes)
    if any(outcome.state is State.FAILED for outcome in batch.outcomes):
        raise typer.Exit(1)


def _print(outcomes: Sequence[Outcome]) -> None:
    """Print a line for each entry, and how many entries are in each state."""
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
