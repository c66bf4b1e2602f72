"""Whether the written files hold what the plan says, to the byte; torch is needed for rounding."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

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

if TYPE_CHECKING:
    from hashlib import _Hash

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


def compare_tensors(
    plan: ConversionPlan,
    converted: Converted,
    progress: Progress,
    digest: "_Hash | None" = None,
) -> None:
    """Check that the written tensors have the bytes of the source, or its values, rounded.

    Args:
        plan: says what each tensor is made of.
        converted: what was written.
        progress: reports the bytes compared.
        digest: is given the whole file that was written, as it is read; there must be only one,
            in which tensors do not overlap.

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
    in_order = sorted(written.items(), key=lambda item: (item[1].file, item[1].offset))
    for path in dict.fromkeys(copy.file for copy in written.values()):
        with path.open("rb") as file:
            for name, copy in in_order:
                if copy.file == path:
                    _go_to(copy.offset, file, digest)
                    _compare(name, plan, copy, file, advance, digest)
            if digest is not None:
                digest.update(file.read())
    logger.debug(f"{len(written)} tensors are those of the source")


def _go_to(offset: int, file: BinaryIO, digest: "_Hash | None") -> None:
    if digest is None:
        file.seek(offset)
    else:
        digest.update(file.read(offset - file.tell()))  # the header


def _compare(
    name: str,
    plan: ConversionPlan,
    copy: TensorInfo,
    file: BinaryIO,
    advance: Callable[[int], None],
    digest: "_Hash | None",
) -> None:
    tensor = plan.tensors[name]
    same_type = (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    if not same_type or not _same_numbers(tensor, copy.dtype, file, advance, digest):
        files = " and ".join(sorted({str(info.file) for info in tensor.sources}))
        raise ValidationError(
            f"{name} differs from {tensor.label} of the source {files}"
            f"{f' rounded to {float_name(plan.rounded_to)}' if plan.rounded_to else ''}."
        )


def _same_numbers(
    tensor: PlannedTensor,
    dtype: str,
    file: BinaryIO,
    advance: Callable[[int], None],
    digest: "_Hash | None",
) -> bool:
    """Whether what comes next in a file has the pieces' values, rounded if dtypes differ."""
    for piece in tensor.pieces:
        chunks = [piece.data] if isinstance(piece, Constant) else contiguous_chunks(piece)
        for chunk in chunks:
            data = file.read(len(chunk) * DTYPE_BITS[dtype] // DTYPE_BITS[piece.dtype])
            if digest is not None:
                digest.update(data)
            if piece.dtype == dtype:
                same = data == chunk
            else:
                same = _is_rounded(data, dtype, chunk, piece.dtype)
            if not same:
                return False
            advance(len(data))
    return True


def _is_rounded(data: bytes, dtype: str, source: bytes, source_dtype: str) -> bool:
    """Whether ``data`` has the numbers that torch rounds those of a source to."""
    import torch

    from speculators.models.blocks import single_threaded
    from speculators.models.tensors import TORCH_DTYPES

    with single_threaded():
        found = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype])
        given = torch.frombuffer(bytearray(source), dtype=TORCH_DTYPES[source_dtype])
        expected = given.to(found.dtype)
        return torch.equal(found, expected) or torch.allclose(
            found, expected, rtol=0, atol=0, equal_nan=True
        )
