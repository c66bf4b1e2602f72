"""Computing in float32 with matrices of which only some rows are in memory as float32.

A float32 copy of a model in bfloat16 takes twice its size. Here only the rows that are being used
are upcast, which is exact: float32 holds every number of the narrower dtypes.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_map_only

from speculators.checkpoint.tensor import TensorInfo
from speculators.models.tensors import TORCH_DTYPES, map_tensor

__all__ = [
    "BlockMatrix",
    "UpcastMatrix",
    "all_finite",
    "row_blocks",
    "single_threaded",
    "upcast",
    "upcast_parameters",
]

BLOCK = 1 << 20
"""How many elements are upcast at a time: 4 MB, which stays in the processor's cache."""


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first row of each block of a tensor, and the one after its last."""
    rows = max(1, BLOCK // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


class BlockMatrix(Tensor):
    """What is like a float32 tensor, but gives its rows when they are used.

    A linear layer asks for a block of rows at a time, an embedding for single rows, and a slice for
    those that are in it; any other operation asks for all of them. It cannot be written to.
    """

    @classmethod
    def shaped(cls, shape: Sequence[int]) -> Any:
        """An instance of the class, of this shape, without any rows yet."""
        return Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=torch.float32)

    @abstractmethod
    def fill(self, start: int, stop: int, into: Tensor) -> Tensor:
        """Write rows ``start`` to ``stop`` (exclusive) into a float32 tensor; return it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return BY_ROWS.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch has no types for it
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # what nn.Parameter does to its data
            return args[0]
        args, kwargs = tree_map_only(BlockMatrix, _whole, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


class UpcastMatrix(BlockMatrix):
    """A float32 tensor that holds the narrower numbers it was stored with.

    Attributes:
        stored: the numbers, in float16 or bfloat16; perhaps in a mapped file.

    """

    stored: Tensor

    @classmethod
    def of(cls, stored: Tensor) -> "UpcastMatrix":
        """One that holds these numbers."""
        matrix: UpcastMatrix = cls.shaped(stored.shape)
        matrix.stored = stored
        return matrix

    def fill(self, start: int, stop: int, into: Tensor) -> Tensor:
        """Upcast rows."""
        return into.copy_(self.stored[start:stop])


def _whole(matrix: BlockMatrix) -> Tensor:
    return matrix.fill(0, matrix.shape[0], torch.empty(matrix.shape))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, BlockMatrix):
        return F.linear(x, weight, bias)
    rows, width = weight.shape
    product = x.new_empty(*x.shape[:-1], rows)
    blocks = list(row_blocks(weight.shape))
    buffer = x.new_empty(blocks[0][1] if blocks else 0, width)  # each block in its turn
    for start, stop in blocks:
        block = weight.fill(start, stop, buffer[: stop - start])
        product[..., start:stop] = F.linear(x, block)
    return product if bias is None else product + bias


def _embedding(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(weight, BlockMatrix):
        return F.embedding(ids, weight, *args, **kwargs)
    embedded = ids.new_empty(ids.numel(), weight.shape[1], dtype=torch.float32)
    for place, row in enumerate(ids.flatten().tolist()):
        weight.fill(row, row + 1, embedded[place : place + 1])
    return embedded.view(*ids.shape, -1)


def _item(matrix: Tensor, index: Any) -> Tensor:
    if not isinstance(matrix, BlockMatrix) or not isinstance(index, slice):
        return matrix[index]
    start, stop, step = index.indices(matrix.shape[0])
    rows = torch.empty(max(0, stop - start), *matrix.shape[1:])
    return matrix.fill(start, start + len(rows), rows)[::step]


BY_ROWS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    Tensor.__getitem__: _item,
}
"""What torch is asked for → the same with a matrix that gives its rows when they are used."""


def upcast(stored: Tensor) -> Tensor:
    """A tensor that computes in float32; itself if it is float32, or has integers."""
    if not stored.is_floating_point() or stored.dtype == torch.float32:
        return stored
    return UpcastMatrix.of(stored) if stored.dim() > 1 else stored.float()


def upcast_parameters(model: nn.Module, stored: Mapping[str, TensorInfo]) -> None:
    """Let a model compute in float32, with its matrices left as they are; it cannot be trained.

    Args:
        model: the model, loaded with one dtype.
        stored: its tensors by their names, each with its own dtype. Those that have another one
            than the model was loaded with are taken from their files again.

    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            weight, info = parameter.detach(), stored.get(name)
            if info is not None and TORCH_DTYPES[info.dtype] != weight.dtype:
                weight = map_tensor(info)
            setattr(
                module,
                name.rpartition(".")[2],
                nn.Parameter(upcast(weight), requires_grad=False),
            )


def all_finite(parameter: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; it is looked at in blocks."""
    stored = parameter.stored if isinstance(parameter, UpcastMatrix) else parameter.detach()
    if not stored.numel():
        return True
    stored = stored.reshape(len(stored), -1) if stored.dim() else stored.reshape(1, 1)
    extremes = [stored[start:stop].aminmax() for start, stop in row_blocks(stored.shape)]
    return all(bool(low.isfinite() & high.isfinite()) for low, high in extremes)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Compute in one thread.

    Blocks are so small that several threads save little where the cores are free, and where they
    are not, threads that wait for each other multiply the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
