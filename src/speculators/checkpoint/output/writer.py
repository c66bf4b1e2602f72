"""Write safetensors files by copying the tensors' bytes, in constant memory.

Contiguous tensors are copied by the kernel and never enter this process's memory; others, and those
that get another dtype, pass through it a few megabytes at a time.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from speculators.checkpoint.files.safetensors_file import encode_header
from speculators.checkpoint.output.rounding import round_to
from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.tensor import (
    DTYPE_BITS,
    FLOATS,
    Constant,
    PlannedTensor,
    TensorInfo,
)
from speculators.errors import CheckpointError, ConversionError

__all__ = ["contiguous_chunks", "write_safetensors_file"]

CHUNK_BYTES = 8 << 20
ROUNDED_BYTES = 1 << 19  # arithmetic is fastest within the processor's cache
COPY_BYTES = 1 << 28  # small enough for a progress bar to move and Ctrl-C to take effect


def write_safetensors_file(
    path: Path, tensors: Mapping[str, PlannedTensor], *, progress: Progress = silent
) -> None:
    """Write a new safetensors file.

    Args:
        path: the file to create; it must not exist.
        tensors: name in the new file → the tensor. Like the safetensors library, this sorts by
            dtype, the widest first, and then by name, so that every tensor is aligned.
        progress: reports the bytes written.

    Raises:
        CheckpointError: if a source file cannot be read, or ends before its tensor does.
        ConversionError: if a dtype cannot hold a value that is rounded to it.
        OSError: if the disk is full, and the like.

    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1].dtype], item[0])))
    advance = progress("Writing", sum(tensor.nbytes for tensor in ordered.values()))
    with path.open("xb", buffering=0) as file:
        target = file.fileno()
        _write_all(target, encode_header(ordered, {"format": "pt"}))
        for tensor in ordered.values():
            for piece in tensor.pieces:
                _write_piece(piece, tensor.dtype, target, advance)


def _write_piece(
    piece: TensorInfo | Constant, dtype: str, target: int, advance: Callable[[int], None]
) -> None:
    if isinstance(piece, Constant):
        _write_all(target, piece.data)
        advance(piece.nbytes)
    elif piece.strides is None and piece.dtype == dtype:
        _copy(piece, target, advance)
    else:
        for chunk in _rounded_chunks(piece, dtype):
            _write_all(target, chunk)
            advance(len(chunk))


def contiguous_chunks(info: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """A tensor's bytes in row-major order, in pieces of whole elements.

    Args:
        info: the tensor.
        chunk_bytes: the approximate size of a piece; a multiple of 8.

    Raises:
        CheckpointError: if the file cannot be read, or ends before the tensor does.

    """
    if info.nbytes == 0:
        return
    if info.strides is None:
        with info.file.open("rb") as source:
            for done in range(0, info.nbytes, chunk_bytes):
                size = min(info.nbytes - done, chunk_bytes)
                yield _read(info, source.fileno(), info.offset + done, size)
        return

    import numpy as np

    item = DTYPE_BITS[info.dtype] // 8
    with info.file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        axes = zip(info.shape, info.strides, strict=True)
        reach = sum((size - 1) * stride for size, stride in axes)
        if info.offset + (reach + 1) * item > len(data):
            raise _truncated(info)
        view = np.ndarray(
            info.shape,
            np.dtype(f"V{item}"),
            buffer=data,
            offset=info.offset,
            strides=tuple(stride * item for stride in info.strides),
        )
        rows = np.atleast_1d(view.squeeze())
        rows_per_chunk = max(1, chunk_bytes // (rows[0].size * item))
        for start in range(0, len(rows), rows_per_chunk):
            yield rows[start : start + rows_per_chunk].tobytes()
        # The mmap cannot be closed while arrays view it.
        del view, rows


def _rounded_chunks(info: TensorInfo, dtype: str) -> Iterator[bytes]:
    if dtype == info.dtype:
        yield from contiguous_chunks(info)
        return
    for chunk in contiguous_chunks(info, ROUNDED_BYTES):
        try:
            yield round_to(dtype, info.dtype, chunk)
        except OverflowError as error:
            kind = FLOATS[dtype]
            raise ConversionError(
                f"{info.file}: {info.name} has values of {error.args[0]:.6g}, and {kind.name} goes "
                f"up to {kind.largest:.6g} only; choose a dtype that holds them, or keep its own."
            ) from error


def _copy(info: TensorInfo, target: int, advance: Callable[[int], None]) -> None:
    with info.file.open("rb") as source:
        done = 0
        while done < info.nbytes:
            copied = _copy_some(info, source.fileno(), done, target)
            done += copied
            advance(copied)


def _copy_some(info: TensorInfo, source: int, done: int, target: int) -> int:
    """Copy some bytes of a tensor, after the first ``done``; return how many."""
    offset, left = info.offset + done, info.nbytes - done
    # If the kernel cannot copy between these two files, copying by hand does. If it was an error,
    # copying by hand shows whether the reading or the writing fails.
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):
            size = min(left, COPY_BYTES)
            if copied := os.copy_file_range(source, target, size, offset_src=offset):
                return copied
    chunk = _read(info, source, offset, min(left, CHUNK_BYTES))
    _write_all(target, chunk)
    return len(chunk)


def _read(info: TensorInfo, source: int, offset: int, size: int) -> bytes:
    """Read exactly ``size`` bytes of a tensor's file."""
    parts = []
    while size:
        try:
            part = os.pread(source, size, offset)
        except OSError as error:
            raise CheckpointError(
                f"{info.file} cannot be read within the tensor {info.name}: {error.strerror}; "
                "check its disk, or fetch it again."
            ) from error
        if not part:
            raise _truncated(info)
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def _truncated(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.file} is truncated: it ends within the tensor {info.name}; fetch it again."
    )
