"""Write safetensors files by copying the tensors' bytes, in constant memory.

Contiguous tensors are copied by the kernel and never enter this process's memory. Others, and those
that get another dtype, pass through it a few megabytes at a time; if the sources are to be hashed,
all of their bytes do, in one pass that copies and hashes them.

Each source file is opened once, and must be the one whose header was read, before and after.
"""

import errno
import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators.checkpoint.files.safetensors_file import PIPE_BYTES, encode_header
from speculators.checkpoint.identity import FileIdentity, open_unchanged
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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Look", "contiguous_chunks", "copy_file", "write_safetensors_file"]

CHUNK_BYTES = 1 << 20  # small enough for the processor's cache, and for memory to be used again
ROUNDED_BYTES = 1 << 19  # arithmetic is fastest within the processor's cache
COPY_BYTES = 1 << 28  # small enough for a progress bar to move and Ctrl-C to take effect
STRIDED_BYTES = 64 << 20
"""Bytes that are read at a time of a tensor that is not contiguous, and made contiguous."""

Look = Callable[[memoryview], None]
"""Is called with the bytes of a tensor in row-major order, some whole elements at a time."""

LOOKED_AT_BYTES = 1 << 18
"""Few enough to be still in the processor's cache when they are written. Twice as many at a time
took up to four times as long now and then, since the kernel sought larger runs of free pages."""

MOST_GROWTH = 8
SMALL_BYTES = 64 << 20
"""More than so many bytes are not written if that is over ``MOST_GROWTH`` times what is read:
rounding to float32 doubles a tensor, but a view that repeats its elements can be of any size."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece of a source, and where it goes.

    Attributes:
        info: the piece.
        dtype: the dtype to write.
        position: the offset in the new file.

    """

    info: TensorInfo
    dtype: str
    position: int

    @property
    def start(self) -> int:
        """Where a contiguous piece begins in its file."""
        return self.info.offset

    @property
    def end(self) -> int:
        """Where a contiguous piece ends in its file."""
        return self.info.offset + self.info.nbytes


def write_safetensors_file(
    path: Path,
    tensors: Mapping[str, PlannedTensor],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = silent,
    hashed: bool = False,
    look: Callable[[TensorInfo], Look | None] | None = None,
) -> dict[Path, str]:
    """Write a new safetensors file.

    Args:
        path: the file to create; it must not exist.
        tensors: name in the new file → the tensor. Like the safetensors library, this sorts by
            dtype, the widest first, and then by name, so that every tensor is aligned.
        metadata: what its header says, besides that it is for PyTorch.
        progress: reports the bytes written.
        hashed: whether to hash the sources. Their bytes are hashed as they are copied, so the hash
            is that of what was copied; only tensors that are not contiguous are read again, from
            the same open file.
        look: gives, for a piece of a source, what is called with its bytes in order, some at a time
            and before they are written, if anything is. They pass through memory then. Not with
            ``hashed``.

    Returns:
        The SHA-256, in hexadecimal digits, of each source file that a piece lies in; nothing unless
        ``hashed``.

    Raises:
        CheckpointError: if a source file cannot be read, ends before its tensor does, is not the
            one whose header was read, or is written to meanwhile; or if the tensors would take far
            more space than their sources do.
        ConversionError: if a dtype cannot hold a value that is rounded to it.
        OSError: if the disk is full, and the like; before anything is written if the file system
            tells that it has no room.

    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1].dtype], item[0])))
    total = sum(tensor.nbytes for tensor in ordered.values())
    header = encode_header(ordered, {"format": "pt", **(metadata or {})})
    _check_size(total, ordered)
    _check_room(len(header) + total, path)
    placed: dict[tuple[Path, FileIdentity | None], list[_Placed]] = defaultdict(list)
    hashes: dict[Path, str] = {}
    advance = progress("Writing", total)
    buffer = memoryview(bytearray(LOOKED_AT_BYTES if look else 0))
    with path.open("xb", buffering=0) as file, ExitStack() as sources:
        target = file.fileno()
        _write_all(target, header)
        position = len(header)
        for tensor in ordered.values():
            for piece in tensor.pieces:
                if isinstance(piece, Constant):
                    _write_at(target, position, piece.data)
                    advance(piece.nbytes)
                    position += piece.nbytes
                else:
                    place = _Placed(piece, tensor.dtype, position)
                    placed[piece.file, piece.identity].append(place)
                    position += piece.elements * DTYPE_BITS[tensor.dtype] // 8
        for (source, identity), pieces in placed.items():
            descriptor = sources.enter_context(open_unchanged(source, identity)).fileno()
            if hashed:
                hashes[source] = _copy_and_hash(source, pieces, descriptor, target, advance)
            else:
                for place in pieces:
                    if looking := look and look(place.info):
                        _write_and_show(place, descriptor, target, advance, looking, buffer)
                    else:
                        _write_piece(place, descriptor, target, advance)
    return hashes


def copy_file(source: Path, identity: FileIdentity | None, target: Path) -> None:
    """Copy a file as it is.

    Args:
        source: the file.
        identity: what it was when it was found; what it is now, if not given.
        target: the new file.

    Raises:
        CheckpointError: if the source changed since, or cannot be read.
        OSError: if the target cannot be written.

    """
    with open_unchanged(source, identity) as file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy, CHUNK_BYTES)


def _check_size(total: int, tensors: Mapping[str, PlannedTensor]) -> None:
    """Check that a few bytes are not blown up, which only a view that repeats them does."""
    sources = {info.file: info for tensor in tensors.values() for info in tensor.sources}
    read = sum(
        info.identity.size if info.identity else path.stat().st_size
        for path, info in sources.items()
    )
    if total > max(SMALL_BYTES, MOST_GROWTH * read) and sources:
        largest = max(
            (info for tensor in tensors.values() for info in tensor.sources),
            key=lambda info: info.nbytes,
        )
        raise CheckpointError(
            f"{largest.file}: the tensors would take {total} bytes, while the checkpoint has "
            f"{read}, since they repeat their elements ({largest.name} is the largest); save "
            "contiguous tensors."
        )


def _check_room(size: int, path: Path) -> None:
    """Check that the disk has room for a file, if it tells."""
    disk = os.statvfs(path.parent)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and size > free:
        raise OSError(errno.ENOSPC, f"it takes {size} bytes, and {free} are free")


def _copy_and_hash(
    path: Path,
    pieces: list[_Placed],
    source: int,
    target: int,
    advance: Callable[[int], None],
) -> str:
    """Copy pieces of one file while all of it is read and hashed, from its start to its end."""
    digest = hashlib.sha256()
    waiting = sorted((it for it in pieces if it.info.strides is None), key=lambda it: -it.start)
    size = os.fstat(source).st_size
    bounds = {bound for it in waiting for bound in (it.start, it.end)}
    position, active = 0, list[_Placed]()
    for bound in sorted({*bounds, size}):
        # Between two bounds the same pieces are copied, so parts of them are of whole elements.
        while position < bound:
            data = _read(path, source, position, min(bound - position, CHUNK_BYTES))
            digest.update(data)
            for it in active:
                _write_part(it, position - it.start, data, target, advance)
            position += len(data)
        while waiting and waiting[-1].start <= bound:
            active.append(waiting.pop())
        active = [it for it in active if it.end > bound]
    for it in pieces:
        if it.info.strides is not None:
            _write_piece(it, source, target, advance)
    return digest.hexdigest()


def _write_part(
    piece: _Placed, done: int, data: bytes, target: int, advance: Callable[[int], None]
) -> None:
    """Write the part of a contiguous piece that begins after its first ``done`` bytes."""
    info = piece.info
    start = piece.position + done * DTYPE_BITS[piece.dtype] // DTYPE_BITS[info.dtype]
    os.lseek(target, start, os.SEEK_SET)
    for chunk in _rounded([data], info, piece.dtype):
        _write_all(target, chunk)
        advance(len(chunk))


def _write_piece(piece: _Placed, source: int, target: int, advance: Callable[[int], None]) -> None:
    info = piece.info
    os.lseek(target, piece.position, os.SEEK_SET)
    if info.strides is None and info.dtype == piece.dtype:
        _copy(piece, source, target, advance)
        return
    for chunk in _rounded(_chunks(info, source, CHUNK_BYTES), info, piece.dtype):
        _write_all(target, chunk)
        advance(len(chunk))


def _write_and_show(
    piece: _Placed,
    source: int,
    target: int,
    advance: Callable[[int], None],
    look: Look,
    buffer: memoryview,
) -> None:
    """Write a piece by way of a buffer, which ``look`` is called with each time that it is full."""
    info = piece.info
    if info.strides is not None or info.dtype != piece.dtype:
        for data in _chunks(info, source, CHUNK_BYTES):
            look(memoryview(data))
        _write_piece(piece, source, target, advance)
        return
    os.lseek(target, piece.position, os.SEEK_SET)
    done = 0
    while done < info.nbytes:
        until_run = -(piece.position + done) % len(buffer)  # see ``_copy_some``
        chunk = buffer[: min(info.nbytes - done, until_run or len(buffer))]
        _read_into(chunk, info.file, source, info.offset + done, info.name)
        look(chunk)
        _write_all(target, chunk)
        advance(len(chunk))
        done += len(chunk)


def contiguous_chunks(info: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """A tensor's bytes in row-major order, in pieces of whole elements.

    Args:
        info: the tensor.
        chunk_bytes: the approximate size of a piece; a multiple of 8.

    Raises:
        CheckpointError: if the file cannot be read, ends before the tensor does, or is not the one
            whose header was read.

    """
    with open_unchanged(info.file, info.identity) as source:
        yield from _chunks(info, source.fileno(), chunk_bytes)


def _chunks(info: TensorInfo, source: int, chunk_bytes: int) -> Iterator[bytes]:
    if info.nbytes == 0:
        return
    if info.strides is not None:
        for block in _strided_blocks(info, source):
            for start in range(0, len(block), chunk_bytes):
                yield bytes(block[start : start + chunk_bytes])
        return
    for done in range(0, info.nbytes, chunk_bytes):
        size = min(info.nbytes - done, chunk_bytes)
        yield _read(info.file, source, info.offset + done, size, info.name)


def _strided_blocks(info: TensorInfo, source: int) -> Iterator[memoryview]:
    """The bytes of a tensor that is not contiguous, some rows at a time.

    They are read, not mapped: a mapped file that shrinks would end the process.
    """
    import numpy as np

    assert info.strides is not None
    item = DTYPE_BITS[info.dtype] // 8
    axes = [axis for axis in zip(info.shape, info.strides, strict=True) if axis[0] != 1] or [(1, 1)]
    shape, strides = zip(*axes, strict=True)
    rows = max(1, STRIDED_BYTES // (info.nbytes // shape[0]))
    for start in range(0, shape[0], rows):
        block = np.empty((min(rows, shape[0] - start), *shape[1:]), np.dtype(f"V{item}"))
        _read_strided(info, source, info.offset + start * strides[0] * item, strides, block)
        yield block.reshape(-1).view(np.uint8).data


def _read_strided(
    info: TensorInfo,
    source: int,
    offset: int,
    strides: tuple[int, ...],
    block: "NDArray[np.void]",
) -> None:
    """Fill a block, whose elements lie at ``strides`` from each other in the file."""
    import numpy as np

    item = block.itemsize
    reaches = [(size - 1) * stride for size, stride in zip(block.shape, strides, strict=True)]
    span = (sum(reaches) + 1) * item
    if span <= STRIDED_BYTES:
        steps = tuple(stride * item for stride in strides)
        data = _read(info.file, source, offset, span, info.name)
        block[...] = np.ndarray(block.shape, block.dtype, data, strides=steps)
        return
    axis = reaches.index(max(reaches))
    half = block.shape[axis] // 2
    first: list[Any] = [slice(None)] * block.ndim
    second = first.copy()
    first[axis], second[axis] = slice(half), slice(half, None)
    _read_strided(info, source, offset, strides, block[tuple(first)])
    later = offset + half * strides[axis] * item
    _read_strided(info, source, later, strides, block[tuple(second)])


def _rounded(chunks: Iterable[bytes], info: TensorInfo, dtype: str) -> Iterator[bytes]:
    """Bytes of a tensor, rounded to ``dtype`` if it has another one."""
    for chunk in chunks:
        if dtype == info.dtype:
            yield chunk
            continue
        for start in range(0, len(chunk), ROUNDED_BYTES):
            try:
                yield round_to(dtype, info.dtype, chunk[start : start + ROUNDED_BYTES])
            except OverflowError as error:
                kind = FLOATS[dtype]
                raise ConversionError(
                    f"{info.file}: {info.name} has values of {error.args[0]:.6g}, and {kind.name} "
                    f"goes up to {kind.largest:.6g} only; choose a dtype that holds them, or keep "
                    "its own."
                ) from error


def _copy(piece: _Placed, source: int, target: int, advance: Callable[[int], None]) -> None:
    done = 0
    while done < piece.info.nbytes:
        copied = _copy_some(piece, source, done, target)
        done += copied
        advance(copied)


def _copy_some(piece: _Placed, source: int, done: int, target: int) -> int:
    """Copy some bytes of a tensor, after the first ``done``; return how many."""
    info = piece.info
    offset, left = info.offset + done, info.nbytes - done
    # If the kernel cannot copy between these two files, copying by hand does. If it was an error,
    # copying by hand shows whether the reading or the writing fails.
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):
            # The kernel copies runs of pages. It takes half as long again if these do not begin
            # where the target's do (Linux 6.18, ext4), so the first copy ends there.
            until_run = -(piece.position + done) % PIPE_BYTES
            size = min(left, until_run or COPY_BYTES)
            if copied := os.copy_file_range(source, target, size, offset_src=offset):
                return copied
    chunk = _read(info.file, source, offset, min(left, CHUNK_BYTES), info.name)
    _write_all(target, chunk)
    return len(chunk)


def _read(path: Path, source: int, offset: int, size: int, tensor: str | None = None) -> bytes:
    """Read exactly ``size`` bytes of an open file, or of the tensor that lies there."""
    parts = []
    while size:
        with _reading(path, tensor):
            part = os.pread(source, size, offset)
        _check_read(len(part), path, tensor)
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_into(
    chunk: memoryview, path: Path, source: int, offset: int, tensor: str | None = None
) -> None:
    """Fill memory with the bytes of an open file from ``offset`` on."""
    os.lseek(source, offset, os.SEEK_SET)
    while chunk:
        with _reading(path, tensor):
            size = os.readv(source, [chunk])
        _check_read(size, path, tensor)
        chunk = chunk[size:]


@contextmanager
def _reading(path: Path, tensor: str | None) -> Iterator[None]:
    """Say of what is read that it cannot be."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read{_within(tensor)}: {error.strerror}; check its disk, or fetch "
            "it again."
        ) from error


def _check_read(size: int, path: Path, tensor: str | None) -> None:
    if not size:
        raise CheckpointError(f"{path} is truncated: it ends{_within(tensor)}; fetch it again.")


def _within(tensor: str | None) -> str:
    return f" within the tensor {tensor}" if tensor else ""


def _write_at(target: int, position: int, data: bytes) -> None:
    os.lseek(target, position, os.SEEK_SET)
    _write_all(target, data)


def _write_all(target: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
