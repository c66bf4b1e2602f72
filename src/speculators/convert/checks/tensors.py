"""Whether the written files hold what the plan says, to the byte."""

import json
from collections.abc import Callable

import torch
from loguru import logger

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.progress import Progress
from speculators.checkpoint.tensor import (
    DTYPE_BITS,
    Constant,
    PlannedTensor,
    TensorInfo,
    float_name,
)
from speculators.convert.plan import ConversionPlan
from speculators.errors import ValidationError
from speculators.families.converted import Converted
from speculators.models.tensors import TORCH_DTYPES

__all__ = ["compare_configs", "compare_tensors"]

NOT_OF_THE_SOURCE = {"speculators_version", "speculators_config"}
"""Keys of config.json that do not come from the source: who wrote it, and how to speculate."""


def compare_configs(plan: ConversionPlan, converted: Converted) -> None:
    """Check that the written config.json is the plan's.

    Raises:
        ValidationError: if not; the message names the keys.

    """
    planned = json.loads(plan.config.model_dump_json(exclude_none=True))
    written = converted.checkpoint.config
    differing = [
        key
        for key in sorted((planned.keys() | written.keys()) - NOT_OF_THE_SOURCE)
        if planned.get(key) != written.get(key)
    ]
    if differing:
        raise ValidationError(
            f"{converted.checkpoint.config_file} is not what the source gives: it has another "
            f"{', '.join(differing)}."
        )


def compare_tensors(plan: ConversionPlan, converted: Converted, progress: Progress) -> None:
    """Check that the written tensors have the bytes of the source, or its values, rounded.

    Raises:
        ValidationError: if not; the message names the tensor.

    """
    written = converted.checkpoint.tensors
    if plan.tensors.keys() != written.keys():
        raise ValidationError(
            "The converted checkpoint has other tensors than planned: "
            f"{', '.join(sorted(plan.tensors.keys() ^ written.keys()))}."
        )
    advance = progress("Comparing", plan.nbytes)
    for name, tensor in plan.tensors.items():
        copy = written[name]
        same_type = (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        if not same_type or not _same_numbers(tensor, copy, advance):
            files = " and ".join(sorted({str(info.file) for info in tensor.sources}))
            raise ValidationError(
                f"{name} differs from {tensor.label} of the source {files}"
                f"{f' rounded to {float_name(plan.rounded_to)}' if plan.rounded_to else ''}."
            )
    logger.debug(f"{len(written)} tensors are those of the source")


def _same_numbers(tensor: PlannedTensor, copy: TensorInfo, advance: Callable[[int], None]) -> bool:
    """Whether ``copy``, which is contiguous, has the pieces' values, rounded if dtypes differ."""
    with copy.file.open("rb") as file:
        file.seek(copy.offset)
        for piece in tensor.pieces:
            chunks = [piece.data] if isinstance(piece, Constant) else contiguous_chunks(piece)
            for chunk in chunks:
                data = file.read(len(chunk) * DTYPE_BITS[copy.dtype] // DTYPE_BITS[piece.dtype])
                if piece.dtype == copy.dtype:
                    same = data == chunk
                else:
                    found = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[copy.dtype])
                    source = torch.frombuffer(bytearray(chunk), dtype=TORCH_DTYPES[piece.dtype])
                    same = torch.allclose(
                        found, source.to(found.dtype), rtol=0, atol=0, equal_nan=True
                    )
                if not same:
                    return False
                advance(len(data))
    return True
