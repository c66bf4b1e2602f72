"""Which engines serve a draft, and why others do not, by its family's table of readers.

``inspect``, ``export``, conversions and the model card all ask here, so that they say the same.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache

from speculators.families.family import Family
from speculators.families.signature import ENGINES, Serving
from speculators.families.target import Depth, Target
from speculators.format.config import SpeculatorConfig

__all__ = ["Judgement", "Refusal", "Way", "judge", "judge_published", "obstacle", "unserved"]

NOT_OF_THIS_KIND = "it serves no drafts of this kind"
ONLY_EXPORTS = "it serves only such drafts as can be exported for it"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to serve a draft.

    Attributes:
        serving: the engine, and what option it takes.
        export: the target of an export that it reads; ``None`` if it reads the draft as converted.

    """

    serving: Serving
    export: str | None

    def __str__(self) -> str:
        """The engine, and in parentheses what option it takes."""
        note = f"after export --to {self.export}" if self.export else ""
        notes = "; ".join(filter(None, (self.serving.note, note)))
        return str(replace(self.serving, note=notes))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an engine does not serve a draft, or does not in one of its ways.

    Attributes:
        engine: one of ``ENGINES``.
        export: the target of an export that it would read; ``None`` if there is none.
        why: a clause.
        note: which way is meant, as it follows the engine's name; empty for the only one.

    """

    engine: str
    export: str | None
    why: str
    note: str = ""

    def __str__(self) -> str:
        """The engine, and why."""
        return f"{' '.join(filter(None, (self.engine, self.note)))}: {self.why}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Which engines serve a draft, and which do not."""

    ways: tuple[Way, ...]
    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        """A clause on which engines serve it."""
        if not self.ways:
            return "no engine serves it"
        return f"it is served by {', '.join(map(str, self.ways))}"


def judge(
    family: Family, config: SpeculatorConfig, features: frozenset[str], depth: Depth = lambda: None
) -> Judgement:
    """Find out which engines serve a draft.

    Args:
        family: its family.
        config: its config.
        features: its features.
        depth: gives the number of its verifier's layers, if that is known.

    """
    ways: list[Way] = []
    refusals: list[Refusal] = []
    depth = cache(depth)
    for engine in ENGINES:
        readers = _readers(family, engine)
        found = [(name, it, obstacle(family, config, features, it, depth)) for name, it in readers]
        for name, reader, why in found:
            if why is None and (serving := _serving(reader, config, depth)) not in _servings(ways):
                ways.append(Way(serving, name))
        refusals += _refusals(engine, found)
    return Judgement(tuple(ways), tuple(refusals))


def judge_published(family: Family, served_by: Collection[str]) -> Judgement:
    """Say which engines serve a draft that the format cannot express, given those that do."""
    ways = [Way(it, None) for it in family.signature.serving or () if it.engine in served_by]
    others = [it for it in ENGINES if it not in served_by]
    return Judgement(tuple(ways), tuple(Refusal(it, None, ONLY_EXPORTS) for it in others))


def _servings(ways: Sequence[Way]) -> list[Serving]:
    return [it.serving for it in ways]


def _readers(family: Family, engine: str) -> list[tuple[str | None, Target]]:
    """What an engine reads of a family's drafts: target of an export, or ``None`` → the layout."""
    readers = [(None, family.as_converted), *family.targets.items()]
    return [
        (name, it)
        for name, it in readers
        if it is not None and it.serving is not None and it.serving.engine == engine
    ]


def _serving(reader: Target, config: SpeculatorConfig, depth: Depth) -> Serving:
    """How a reader that can compute a draft serves it."""
    serving = reader.serving_of(config)
    conditions = [it.condition(config) for it in reader.limits]
    if not any(conditions) or depth() is not None:
        return serving
    return replace(serving, note="; ".join(filter(None, (serving.note, *conditions))))


def _refusals(engine: str, found: Sequence[tuple[str | None, Target, str | None]]) -> list[Refusal]:
    """Why an engine does not read some of the layouts of a draft, given all that it reads."""
    if not found:
        return [Refusal(engine, None, NOT_OF_THIS_KIND)]
    exports = [it for it in found if it[0] is not None]
    return [
        Refusal(engine, name, f"the draft {why}", reader.serving.note if reader.serving else "")
        for name, reader, why in exports or found
        if why is not None
    ]


def unserved(family: Family, config: SpeculatorConfig, features: frozenset[str]) -> str | None:
    """Why no engine serves a draft as it is converted, and what serves it, as a clause.

    ``None`` if one does.
    """
    if family.as_converted is None:
        return f"no engine reads it in this format; {judge(family, config, features)}"
    why = obstacle(family, config, features, family.as_converted)
    return why and f"the draft {why}; {judge(family, config, features)}"


def obstacle(
    family: Family,
    config: SpeculatorConfig,
    features: frozenset[str],
    target: Target,
    depth: Depth = lambda: None,
) -> str | None:
    """What a draft has that the reader of a layout cannot compute, as a clause that follows "it".

    ``None`` if there is nothing.

    Args:
        family: the family of the draft.
        config: its config.
        features: its features.
        target: the layout.
        depth: gives the number of its verifier's layers, if that is known.

    """
    if lacking := features & target.lacks:
        return f"has {' and '.join(family.features[it] for it in sorted(lacking))}"
    activation = config.transformer_layer_config.hidden_act
    if target.activation not in {None, activation}:
        return f"has an activation other than {target.activation} ({activation})"
    return next(filter(None, (it.found(config, depth) for it in target.limits)), None)
