"""Writing tensors into a safetensors file by moving their bytes, whatever their size.

Contiguous tensors are copied by the kernel and never enter this process's memory; the others
are gathered through a memory map, a few megabytes at a time.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from speculators.checkpoint.safetensors_file import encode_header
from speculators.checkpoint.tensor import DTYPE_BITS, TensorInfo
from speculators.errors import CheckpointError

__all__ = ["contiguous_chunks", "write_safetensors_file"]

CHUNK_BYTES = 8 << 20
# What a file system or kernel answers where it cannot copy between these two files.
NOT_SUPPORTED = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def write_safetensors_file(
    path: Path, tensors: Mapping[str, TensorInfo], progress: Callable[[int], None] | None = None
) -> None:
    """Write a new safetensors file with the bytes that ``tensors`` point at.

    Args:
        path: the file to make; it must not exist.
        tensors: what to write, by the name it gets; the widest dtypes come first in the file,
            then by name, as the safetensors library does it, so that every tensor is aligned.
        progress: called with the number of bytes written since the last call.

    Raises:
        CheckpointError: if a source file ends before its tensor does.
        OSError: if the disk is full, and the like.

    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1].dtype], item[0])))
    with path.open("xb", buffering=0) as target:
        target.write(encode_header(ordered, {"format": "pt"}))
        for info in ordered.values():
            if info.strides is None:
                _copy(info, target.fileno(), progress)
            else:
                for chunk in contiguous_chunks(info):
                    _write_all(target.fileno(), chunk)
                    if progress:
                        progress(len(chunk))


def contiguous_chunks(info: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """A tensor's bytes in row-major order, in pieces of about ``chunk_bytes``.

    Raises:
        CheckpointError: if the file ends before the tensor does.

    """
    if info.nbytes == 0:
        return
    if info.strides is None:
        with info.file.open("rb") as file:
            file.seek(info.offset)
            remaining = info.nbytes
            while remaining:
                chunk = file.read(min(remaining, chunk_bytes))
                if not chunk:
                    raise _truncated(info)
                remaining -= len(chunk)
                yield chunk
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
        # The map cannot be closed while arrays look into it.
        del view, rows


def _copy(info: TensorInfo, target: int, progress: Callable[[int], None] | None) -> None:
    with info.file.open("rb") as source:
        done = 0
        while done < info.nbytes:
            copied = _copy_some(source.fileno(), info.offset + done, target, info.nbytes - done)
            if copied == 0:
                raise _truncated(info)
            done += copied
            if progress:
                progress(copied)


def _copy_some(source: int, offset: int, target: int, size: int) -> int:
    """Copy up to ``size`` bytes to the target's position; returns how many, 0 at the end."""
    step = min(size, 1 << 28)  # small enough for a progress bar to move and Ctrl-C to be heard
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, step, offset_src=offset)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
    chunk = os.pread(source, min(step, CHUNK_BYTES), offset)
    _write_all(target, chunk)
    return len(chunk)


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def _truncated(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.file} is truncated: it ends within the tensor {info.name}; fetch it again."
    )
