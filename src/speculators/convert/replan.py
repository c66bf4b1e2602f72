"""The plan behind a converted checkpoint, to check it again without its source."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from speculators.checkpoint.reader import Checkpoint
from speculators.checkpoint.verifier import Verifier, open_verifier
from speculators.convert.plan import ConversionPlan
from speculators.errors import SpeculatorsError, VerifierError
from speculators.format.config import EagleConfig
from speculators.format.layouts import current_name

__all__ = ["plan_of_itself", "verifier_of"]


@dataclass(slots=True)
class Unavailable:
    """The ``Repository`` of a verifier that cannot be opened: every access raises the error."""

    name: str
    error: SpeculatorsError
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


def verifier_of(config: EagleConfig, *, cache_dir: str | Path | None = None) -> Verifier:
    """The verifier that a config names or, if it cannot be opened, what the config says of it."""
    reference, layer = config.speculators_config.verifier, config.transformer_layer_config
    try:
        if reference.name_or_path is None:
            raise VerifierError("The config names no verifier.")
        return open_verifier(reference.name_or_path, cache_dir=cache_dir)
    except SpeculatorsError as error:
        name = str(reference.name_or_path)
        return Verifier(
            name=name,
            architectures=tuple(reference.architectures),
            hidden_size=layer.hidden_size,
            vocab_size=layer.vocab_size,
            tied=False,
            repository=Unavailable(name, error),
        )


def plan_of_itself(
    written: Checkpoint, config: EagleConfig, verifier: Verifier, renames: Mapping[str, str]
) -> ConversionPlan:
    """The plan that results in ``written``, with its own tensors in place of the source's.

    Args:
        written: the converted checkpoint, in the layout of any version.
        config: its config.
        verifier: the one that it names.
        renames: source name → target name, where they differ, as for ``plan_conversion``.

    """
    source_names = {target: source for source, target in renames.items()}
    tensors = {}
    for name, info in written.tensors.items():
        target = current_name(name)
        tensors[target] = replace(info, name=source_names.get(target, target))
    return ConversionPlan(written, verifier, config, tensors, {}, {}, [])
