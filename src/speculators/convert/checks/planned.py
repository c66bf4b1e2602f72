"""The tensors of a plan as torch tensors, never more of them in memory than is being used."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from speculators.checkpoint.tensor import FLOATS, PlannedTensor
from speculators.convert.plan import ConversionPlan
from speculators.models.blocks import BlockMatrix, upcast
from speculators.models.tensors import read_planned

__all__ = ["PlannedTensors", "planned_matrix"]


class PlannedMatrix(BlockMatrix):
    """A float32 matrix whose rows are read from a source's file when they are used.

    They are read, not mapped: a mapped file that shrinks would end the process.
    """

    planned: PlannedTensor

    @classmethod
    def of(cls, planned: PlannedTensor) -> "PlannedMatrix":
        """The matrix that is planned; rounded if that is planned."""
        matrix: PlannedMatrix = cls.shaped(planned.shape)
        matrix.planned = planned
        return matrix

    def fill(self, start: int, stop: int, into: Tensor) -> Tensor:
        """Read rows."""
        return read_planned(self.planned.slice(start, stop), into)


def planned_matrix(planned: PlannedTensor) -> Tensor:
    """A matrix of a plan that computes in float32.

    One whose rows do not lie in one piece is read as a whole: reading a block of its rows takes
    going through all of it.
    """
    if any(info.strides is not None and info.strides[-1] != 1 for info in planned.sources):
        return upcast(read_planned(planned))
    return PlannedMatrix.of(planned)


class PlannedTensors(Mapping[str, Tensor]):
    """The tensors of a plan, weights in float32, by their names in research checkpoints.

    Args:
        plan: the plan. Its tensors are rounded if it rounds them.

    """

    def __init__(self, plan: ConversionPlan) -> None:
        self._tensors = {
            plan.family.names.in_research(name): tensor for name, tensor in plan.tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.dtype not in FLOATS:
            return read_planned(tensor)
        if len(tensor.shape) == 2:
            return planned_matrix(tensor)
        return read_planned(tensor, torch.empty(tensor.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors
