"""The tensors of a plan as torch tensors, never more of them than are being used."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from speculators.checkpoint.tensor import FLOATS, PlannedTensor
from speculators.convert.plan import ConversionPlan
from speculators.models.tensors import read_planned
from speculators.models.upcast import row_blocks

__all__ = ["PlannedTensors", "read_blocks", "read_rows"]


class PlannedTensors(Mapping[str, Tensor]):
    """The tensors of a plan, weights in float32, by their names in research checkpoints.

    Each is read when it is asked for, and not kept: a reference that goes from matrix to matrix
    needs memory for the largest of them.

    Args:
        plan: the plan. Its tensors are rounded if it rounds them.

    """

    def __init__(self, plan: ConversionPlan) -> None:
        self._tensors = {
            plan.family.names.in_research(name): tensor for name, tensor in plan.tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return read_planned(tensor, torch.empty(tensor.shape) if tensor.dtype in FLOATS else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def read_rows(matrix: PlannedTensor, rows: Tensor) -> Tensor:
    """Rows of a matrix in float32, read one by one, in the shape of their numbers."""
    found = torch.empty(*rows.shape, matrix.shape[1])
    for row, place in zip(rows.flatten().tolist(), found.view(-1, 1, matrix.shape[1]), strict=True):
        read_planned(matrix.slice(row, row + 1), place)
    return found


def read_blocks(matrix: PlannedTensor) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of rows of a matrix in float32: the first row, the one after the last, the block.

    Each takes the place of the one before.
    """
    block = torch.empty(0)
    for start, stop in row_blocks(matrix.shape):
        if not len(block):
            block = torch.empty(stop, matrix.shape[1])
        yield start, stop, read_planned(matrix.slice(start, stop), block[: stop - start])
