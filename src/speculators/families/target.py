"""Layouts that a draft can be written in, who reads them, and what their readers cannot compute."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from speculators.checkpoint.tensor import PlannedTensor
from speculators.families.signature import Serving

__all__ = ["Depth", "Limit", "Target", "limit", "limit_of_layers", "servings"]

Depth = Callable[[], int | None]
"""Gives the number of the verifier's layers, if it is known."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a reader cannot compute, beside features.

    Attributes:
        what: it, as the documentation calls it.
        found: what a draft with a config has of it, as a clause that follows "it"; ``None`` if it
            has nothing of it.
        condition: what the verifier must be like, as a clause, where ``found`` depends on a number
            of layers that is not known; ``None`` if it does not.

    """

    what: str
    found: Callable[[Any, Depth], str | None]
    condition: Callable[[Any], str | None] = lambda config: None  # noqa: ARG005


def limit(what: str) -> Callable[[Callable[[Any], str | None]], Limit]:
    """Make a limit of a function of the config."""
    return lambda found: Limit(what, lambda config, _: found(config))


def limit_of_layers(
    what: str, condition: Callable[[Any], str | None]
) -> Callable[[Callable[[Any, int | None], str | None]], Limit]:
    """Make a limit of a function of the config and the number of the verifier's layers."""
    return lambda found: Limit(what, lambda config, depth: found(config, depth()), condition)


@dataclass(frozen=True, slots=True)
class Target:
    """A layout, and who reads it: one to export to, or a family's own.

    Attributes:
        reader: who reads it, for messages.
        layers: ``model_type`` of the draft's layer → the keys of config.json that tell the reader
            which model to build.
        serving: how an engine that reads it serves drafts; ``None`` if the reader is no engine.
        variants: whether a draft, by its config, is served in another way, and that way; the first
            one that applies counts.
        lacks: the features that it cannot express.
        activation: the only one that it computes; ``None`` if it computes any.
        limits: what else it cannot compute.
        prefixes: prefix of names in the format → prefix in this layout, for a config.
        drops: the tensors of the format that this layout has no place for.
        adds: the tensors that it wants beside the format's, for a config.
        advice: a sentence for the log on how to serve a draft with this config, if one is needed.
        zeros: features whose tensors the reader always wants; a draft without them gets zeros.
        remarks: feature → a sentence for the log on what becomes of it; ``None`` for one that
            concerns every draft.

    """

    reader: str
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    serving: Serving | None = None
    variants: tuple[tuple[Callable[[Any], bool], Serving], ...] = ()
    lacks: frozenset[str] = frozenset()
    activation: str | None = None
    limits: tuple[Limit, ...] = ()
    prefixes: Callable[[Any], Mapping[str, str]] = lambda config: {}  # noqa: ARG005
    drops: frozenset[str] = frozenset()
    adds: Callable[[Any], Mapping[str, PlannedTensor]] = lambda config: {}  # noqa: ARG005
    advice: Callable[[Any], str | None] = lambda config: None  # noqa: ARG005
    zeros: frozenset[str] = frozenset()
    remarks: Mapping[str | None, str] = field(default_factory=dict)

    def serving_of(self, config: Any) -> Serving:
        """How the engine that reads it serves a draft with this config."""
        assert self.serving is not None
        return next((it for applies, it in self.variants if applies(config)), self.serving)


def servings(targets: Mapping[str, Target]) -> tuple[Serving, ...]:
    """How the engines among the readers of these layouts serve drafts."""
    return tuple(it.serving for it in targets.values() if it.serving)
