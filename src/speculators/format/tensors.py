"""Tables of tensors: what a draft of a family has to hold, and how a checkpoint differs from it."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from speculators.checkpoint.tensor import FLOATS, PlannedTensor, TensorInfo

__all__ = [
    "Difference",
    "TensorSpec",
    "compare",
    "counts_shown",
    "features_shown",
    "required_tensors",
]

NUMBERED = re.compile(r"\{(\w+)\}")
"""What stands for a number in the name of a ``TensorSpec``, such as ``{layer}``."""

ONE_LAYER: Mapping[str, int] = {"layer": 1}
"""The counts of a draft with one layer, and nothing else that is numbered."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a family, or one tensor of each of its numbered layers or other parts.

    Attributes:
        name: its name in model.safetensors, with ``{layer}`` for the number of a layer, or another
            word for the number of something else that a draft has several of.
        dimensions: its shape, as keys of the family's sizes.
        feature: the feature that it belongs to, or ``None`` if every draft has it.
        dtypes: the dtypes that it may have, by their names in the safetensors format. Only weights
            are ever rounded.
        first: for a numbered tensor, the first number that has it.

    """

    name: str
    dimensions: tuple[str, ...]
    feature: str | None = None
    dtypes: tuple[str, ...] = tuple(FLOATS)
    first: int = 0

    @property
    def numbered(self) -> str | None:
        """What it is numbered by; ``None`` for a single tensor."""
        found = NUMBERED.search(self.name)
        return found[1] if found else None

    @property
    def pattern(self) -> re.Pattern[str]:
        """What its names match; a number is the first group."""
        form = NUMBERED.sub("NUMBER", self.name)
        return re.compile(re.escape(form).replace("NUMBER", r"(\d+)"))

    def names(self, counts: Mapping[str, int]) -> list[str]:
        """The names of the tensors that this stands for, given how many parts a draft has."""
        if self.numbered is None:
            return [self.name]
        numbers = range(self.first, counts.get(self.numbered, 0))
        return [NUMBERED.sub(str(number), self.name) for number in numbers]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for the given sizes."""
        return tuple(sizes[dimension] for dimension in self.dimensions)


def required_tensors(
    table: Iterable[TensorSpec], features: Collection[str], counts: Mapping[str, int] = ONE_LAYER
) -> dict[str, TensorSpec]:
    """The tensors, by name, that a draft with these features and so many parts must have."""
    return {
        name: spec
        for spec in table
        if spec.feature is None or spec.feature in features
        for name in spec.names(counts)
    }


def counts_shown(table: Iterable[TensorSpec], names: Collection[str]) -> dict[str, int]:
    """How many numbered parts of each kind a draft has, by the highest numbers in these names.

    Numbers that are higher than there are names do not count: no draft has so many parts.
    """
    counts: dict[str, int] = {}
    for spec in table:
        if spec.numbered is not None:
            pattern = spec.pattern
            numbers = [int(found[1]) for name in names if (found := pattern.fullmatch(name))]
            count = max((it for it in numbers if it < len(names)), default=-1) + 1
            counts[spec.numbered] = max(count, counts.get(spec.numbered, 0))
    return counts


def features_shown(
    table: Iterable[TensorSpec], names: Collection[str], counts: Mapping[str, int] = ONE_LAYER
) -> dict[str, list[str]]:
    """Each feature of a table → those of the given names that show it.

    One tensor of a feature is enough to show it.
    """
    shown: dict[str, list[str]] = {}
    for spec in table:
        if spec.feature is not None:
            found = shown.setdefault(spec.feature, [])
            found += [name for name in spec.names(counts) if name in names]
    return shown


@dataclass(frozen=True, slots=True)
class Difference:
    """How tensors differ from a table.

    Attributes:
        missing: names in the table that no tensor has.
        unknown: names of tensors that are not in the table.
        reshaped: names of tensors of another shape → the shape by the table.
        retyped: names of tensors of another dtype → the dtypes that the table allows.

    """

    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    retyped: dict[str, tuple[str, ...]] = field(default_factory=dict)


def compare(
    tensors: Mapping[str, TensorInfo | PlannedTensor],
    required: Mapping[str, TensorSpec],
    sizes: Mapping[str, int] | None = None,
) -> Difference:
    """Compare tensors with those that are required.

    Args:
        tensors: by their names in the format.
        required: see ``required_tensors``.
        sizes: the family's sizes; shapes are not compared if not given.

    """
    both = [name for name in required if name in tensors]
    return Difference(
        missing=[name for name in required if name not in tensors],
        unknown=[name for name in tensors if name not in required],
        reshaped={
            name: required[name].shape(sizes)
            for name in both
            if sizes is not None and tensors[name].shape != required[name].shape(sizes)
        },
        retyped={
            name: required[name].dtypes
            for name in both
            if tensors[name].dtype not in required[name].dtypes
        },
    )
