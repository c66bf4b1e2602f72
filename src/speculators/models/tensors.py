"""Reading single tensors of a checkpoint into torch."""

import torch
from torch import Tensor

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import FLOATS, Constant, PlannedTensor, TensorInfo

__all__ = ["TORCH_DTYPES", "read_planned", "read_tensor"]

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
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    position = 0
    for chunk in contiguous_chunks(info):
        # A bytearray, since torch warns about memory that is not writable.
        raw[position : position + len(chunk)] = torch.frombuffer(
            bytearray(chunk), dtype=torch.uint8
        )
        position += len(chunk)
    return raw.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def read_planned(tensor: PlannedTensor) -> Tensor:
    """Read the pieces of a planned tensor into memory, with its shape and dtype.

    Weights are rounded by torch, independently of how they are written.

    Raises:
        CheckpointError: if a file ends before a piece does.

    """
    pieces = [
        torch.frombuffer(bytearray(piece.data), dtype=TORCH_DTYPES[piece.dtype])
        if isinstance(piece, Constant)
        else read_tensor(piece).flatten()
        for piece in tensor.pieces
    ]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return whole.to(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)
