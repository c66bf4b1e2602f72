"""Reading single tensors of a checkpoint into torch."""

from collections.abc import Iterable

import torch
from torch import Tensor

from speculators.checkpoint.identity import open_unchanged
from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import FLOATS, Constant, PlannedTensor, TensorInfo

__all__ = ["TORCH_DTYPES", "map_tensor", "most_used_dtype", "read_planned", "read_tensor"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    **{stored: getattr(torch, dtype.name) for stored, dtype in FLOATS.items()},
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""Dtypes of the tensors of drafts, by the names of the safetensors format."""


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor into memory, with its stored shape and dtype.

    Raises:
        CheckpointError: if its file ends before it does.
        KeyError: if its dtype is not in ``TORCH_DTYPES``.

    """
    return read_planned(PlannedTensor.copy_of(info))


def read_planned(tensor: PlannedTensor, into: Tensor | None = None) -> Tensor:
    """Read the pieces of a planned tensor into memory, with its shape.

    Weights are rounded by torch, independently of how they are written.

    Args:
        tensor: the tensor.
        into: what to fill with its numbers, contiguous and of its shape, perhaps of another dtype;
            a new tensor of its dtype if not given.

    Raises:
        CheckpointError: if a file ends before a piece does.
        KeyError: if a dtype is not in ``TORCH_DTYPES``.

    """
    dtype = TORCH_DTYPES[tensor.dtype]
    whole = torch.empty(tensor.shape, dtype=dtype) if into is None else into
    flat, done = whole.view(-1), 0
    for piece in tensor.pieces:
        chunks = [piece.data] if isinstance(piece, Constant) else contiguous_chunks(piece)
        for chunk in chunks:
            # A bytearray, since torch warns about memory that is not writable.
            numbers = torch.frombuffer(bytearray(chunk), dtype=TORCH_DTYPES[piece.dtype])
            flat[done : done + len(numbers)] = numbers.to(dtype)
            done += len(numbers)
    return whole


def map_tensor(info: TensorInfo) -> Tensor:
    """A tensor in its file, mapped into memory: only what is used is read, and nothing is written.

    One that does not lie in the file as torch needs it is read, see ``read_tensor``.

    Raises:
        CheckpointError: if its file cannot be opened, or is not the one whose header was read.
        KeyError: if its dtype is not in ``TORCH_DTYPES``.

    """
    dtype = TORCH_DTYPES[info.dtype]
    if info.strides is not None or not info.nbytes or info.offset % dtype.itemsize:
        return read_tensor(info)
    end = info.offset + info.nbytes
    with open_unchanged(info.file, info.identity):
        mapped = torch.from_file(str(info.file), shared=False, size=end, dtype=torch.uint8)
    return mapped[info.offset :].view(dtype).view(info.shape)


def most_used_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """The floating-point dtype that most of the bytes of the tensors have."""
    sizes = dict.fromkeys(FLOATS, 0)
    for info in tensors:
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    return TORCH_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]
