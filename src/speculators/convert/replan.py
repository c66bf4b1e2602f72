"""The plan behind a converted checkpoint, to check it again without its source."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.tensor import PlannedTensor
from speculators.checkpoint.verifier import Verifier
from speculators.convert.plan import ConversionPlan
from speculators.errors import SpeculatorsError
from speculators.families.converted import Converted

__all__ = ["plan_of_itself", "unavailable", "verifier_of"]


@dataclass(slots=True)
class Unavailable:
    """The ``Repository`` of a verifier that cannot be opened: every access raises the error."""

    name: str
    error: SpeculatorsError
    hub: HubAccess = DEFAULT_ACCESS
    weights: str | None = None
    commit: str | None = None

    def file(self, filename: str) -> Path | None:  # noqa: ARG002
        """Raise the error."""
        raise self.error

    def part(self, filename: str, tensors: Collection[str]) -> Path | None:  # noqa: ARG002
        """Raise the error."""
        raise self.error

    def holds(self, filename: str) -> bool:  # noqa: ARG002
        """Raise the error."""
        raise self.error

    def names(self) -> list[str]:
        """Raise the error."""
        raise self.error

    def unseen(self) -> str | None:
        """Raise the error."""
        raise self.error


def verifier_of(written: Converted) -> Verifier:
    """The verifier that a draft names or, if it cannot be opened, what the config says of it."""
    try:
        return written.open_verifier()
    except SpeculatorsError as error:
        reference = written.config.speculators_config.verifier
        vocabulary, hidden = written.config.verifier_sizes
        name = str(reference.name_or_path)
        return replace(
            unavailable(name, hidden, vocabulary, error),
            architectures=tuple(reference.architectures),
        )


def unavailable(name: str, hidden_size: int, vocab_size: int, error: SpeculatorsError) -> Verifier:
    """A verifier of which only the sizes are known; whatever else is asked raises the error."""
    return Verifier(
        name=name,
        architectures=(),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tied=False,
        repository=Unavailable(name, error),
    )


def plan_of_itself(written: Converted, verifier: Verifier) -> ConversionPlan:
    """The plan that results in ``written``, with its own tensors in place of the source's.

    Args:
        written: the converted checkpoint, in the layout of any version.
        verifier: the one that it names.

    """
    return ConversionPlan(
        source=written.checkpoint,
        family=written.family,
        verifier=verifier,
        config=written.config,
        features=written.features,
        tensors={
            name: PlannedTensor.copy_of(replace(info, name=written.family.names.in_research(name)))
            for name, info in written.tensors.items()
        },
    )
