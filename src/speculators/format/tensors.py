"""Tables of tensors: what a draft of a family has to hold, and how a checkpoint differs from it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from speculators.checkpoint.tensor import FLOATS, TensorInfo

__all__ = [
    "Difference",
    "TensorSpec",
    "compare",
    "features_shown",
    "required_tensors",
]

LAYER = "{layer}"
"""What stands for a layer's number in the name of a ``TensorSpec``."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a family, or one tensor of each of its numbered layers.

    Attributes:
        name: its name in model.safetensors, with ``{layer}`` for the number of a layer.
        dimensions: its shape, as keys of the family's sizes.
        feature: the feature that it belongs to, or ``None`` if every draft has it.
        dtypes: the dtypes that it may have, by their names in the safetensors format. Only weights
            are ever rounded.
        first_layer: for a numbered tensor, the first layer that has it.

    """

    name: str
    dimensions: tuple[str, ...]
    feature: str | None = None
    dtypes: tuple[str, ...] = tuple(FLOATS)
    first_layer: int = 0

    def names(self, layers: int) -> list[str]:
        """The names of the tensors that this stands for, in a draft of so many layers."""
        if LAYER not in self.name:
            return [self.name]
        numbers = range(self.first_layer, layers)
        return [self.name.replace(LAYER, str(number)) for number in numbers]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for the given sizes."""
        return tuple(sizes[dimension] for dimension in self.dimensions)


def required_tensors(
    table: Iterable[TensorSpec], features: Collection[str], layers: int = 1
) -> dict[str, TensorSpec]:
    """The tensors, by name, that a draft with these features and so many layers must have."""
    return {
        name: spec
        for spec in table
        if spec.feature is None or spec.feature in features
        for name in spec.names(layers)
    }


def features_shown(
    table: Iterable[TensorSpec], names: Collection[str], layers: int = 1
) -> dict[str, list[str]]:
    """Each feature of a table → those of the given names that show it.

    One tensor of a feature is enough to show it.
    """
    shown: dict[str, list[str]] = {}
    for spec in table:
        if spec.feature is not None:
            found = shown.setdefault(spec.feature, [])
            found += [name for name in spec.names(layers) if name in names]
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
    tensors: Mapping[str, TensorInfo],
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
