"""Reading single tensors of a checkpoint into torch."""

import torch
from torch import Tensor

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import FLOATS, TensorInfo

__all__ = ["TORCH_DTYPES", "read_tensor"]

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
