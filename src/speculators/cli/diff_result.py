"""What `speculators diff` prints with --json; apart from the others for what it imports."""

from speculators.cli.results import Result
from speculators.comparison.difference import Difference

__all__ = ["DiffResult"]


class DiffResult(Result):
    """What `speculators diff --json` prints: ``ok`` says whether the two are the same draft."""

    difference: Difference | None = None
    """How they differ; ``None`` if they could not be compared."""
