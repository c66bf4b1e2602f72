"""The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.

Only headers are read and encoded here, never the tensors' bytes. The safetensors project documents
the layout in its README, "Format".
"""

import gc
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from speculators.checkpoint.files.json_file import parse_json
from speculators.checkpoint.files.other_files import refuse_other_files
from speculators.checkpoint.identity import FileIdentity, open_unchanged
from speculators.checkpoint.tensor import (
    DTYPE_BITS,
    MAX_NAME,
    PlannedTensor,
    TensorInfo,
    check_name,
    check_sizes,
)
from speculators.errors import CheckpointError, printable

__all__ = [
    "PIPE_BYTES",
    "PREFIX_BYTES",
    "encode_header",
    "find_data",
    "parse_header",
    "read_safetensors_file",
]

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
ALIGNMENT = 8
PAGE_BYTES = 4096
PIPE_BYTES = 16 * PAGE_BYTES  # what Linux copies from file to file at a time

OTHER_FILES = {
    rb"PK\x03\x04|\x80\x02\x8a\x0a": "is a file that torch.save wrote: rename it to end in .bin.",
}
"""More of ``other_files.OTHER_FILES``."""

_METADATA = '{"__metadata__":'
_PLAIN_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]+)": ?\{"dtype": ?"(\w+)", ?"shape": ?\[([0-9, ]*)\], ?'
    r'"data_offsets": ?\[(0|[1-9][0-9]*), ?(0|[1-9][0-9]*)\]\}(, ?|\} *\Z)'
)
"""An entry of a header as nearly every library writes it, up to the next one or to the end."""


class _Entry(NamedTuple):
    """A checked entry of a header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors_file(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Returns:
        The tensors by name, in the header's order.

    Raises:
        CheckpointError: if the header is damaged, or its tensors do not fill the rest of the file
            exactly, without gaps or overlaps.

    """
    with open_unchanged(path, None) as file:
        identity = FileIdentity.at(file.fileno())
        if file.read(PREFIX_BYTES + 1)[PREFIX_BYTES:] != b"{":
            file.seek(0)
            refuse_other_files(file, path, OTHER_FILES)
        file.seek(0)
        data_start = find_data(file.read(PREFIX_BYTES), identity.size, path)
        header = file.read(data_start - PREFIX_BYTES)
    return parse_header(header, identity.size, path, identity)


def find_data(prefix: bytes, size: int, path: Path) -> int:
    """Return the offset of the tensors' data, from the first ``PREFIX_BYTES`` of a file.

    Args:
        prefix: those bytes.
        size: the size of the whole file, in bytes.
        path: the file, for messages; it is not opened.

    Raises:
        CheckpointError: if the header would not fit into the file, or is larger than any real one.

    """
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: it has only {size} bytes; "
            "fetch it again."
        )
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > size - PREFIX_BYTES:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: its header should take "
            f"{header_bytes} bytes, the file has {size}; fetch it again."
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} has a header of {header_bytes} bytes, more than any table of tensors needs; "
            "fetch it again."
        )
    return PREFIX_BYTES + int(header_bytes)


def parse_header(
    header: bytes, size: int, path: Path, identity: FileIdentity | None = None
) -> dict[str, TensorInfo]:
    """Parse the header of a safetensors file, which is between its prefix and its data.

    Args:
        header: the bytes of the header.
        size: the size of the whole file, in bytes.
        path: the file; it is not opened.
        identity: what the file was when the header was read; it is kept with the tensors.

    Returns, Raises: as ``read_safetensors_file``.

    """
    with _no_collection():
        tensors = _read_plain(header, size, path, identity)
    if tensors is not None:
        return tensors
    data_start = PREFIX_BYTES + len(header)
    tensors, entries = {}, _read_entries(header, path)
    for name, (dtype, shape, begin, end) in entries.items():
        if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - begin):
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(shape)} and type {dtype} cannot take "
                f"{end - begin} bytes, as its header says; the file is damaged, fetch it again."
            )
        tensors[name] = TensorInfo(name, dtype, shape, path, data_start + begin, identity=identity)
    spans = sorted((entry.begin, entry.end, name) for name, entry in entries.items())
    _check_spans(spans, size - data_start, path)
    return tensors


def encode_header(tensors: Mapping[str, PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """Encode the prefix and the header of a safetensors file that holds ``tensors``.

    The data of the tensors has to follow in the mapping's order, without gaps. The header is padded
    so that most of the data keeps its offset within a page, and within the run of pages that the
    kernel copies at a time, from the file that it is copied from: each of the two makes copying a
    fifth faster (measured on Linux 6.18 with ext4).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    same_place: Counter[int] = Counter({0: 0})
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        first = tensor.pieces[0]
        if isinstance(first, TensorInfo) and (first.offset - position) % ALIGNMENT == 0:
            same_place[(first.offset % PAGE_BYTES - position) % PIPE_BYTES] += tensor.nbytes
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    (data_start, most), *_ = same_place.most_common(1)
    step = PIPE_BYTES if most > 16 * PIPE_BYTES else ALIGNMENT
    padded = encoded + b" " * ((data_start - PREFIX_BYTES - len(encoded)) % step)
    return struct.pack("<Q", len(padded)) + padded


@contextmanager
def _no_collection() -> Iterator[None]:
    """Look for no garbage among new objects: with very many, it takes as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_plain(
    header: bytes, size: int, path: Path, identity: FileIdentity | None
) -> dict[str, TensorInfo] | None:
    """Read a header that is right, and laid out as libraries do it; ``None`` for any other.

    The largest headers have half a million entries. Matching a pattern takes a tenth of the time of
    parsing JSON, so this is half of what the rest of the work on them takes.
    """
    tensors: dict[str, TensorInfo] = {}
    kinds: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
    data_start = PREFIX_BYTES + len(header)
    try:
        text = header.decode()
        position, place, after = _find_first_entry(text), 0, ""
        for match in _PLAIN_ENTRY.finditer(text, position):
            name, dtype, sizes, begin, end, after = match.groups()
            if (dtype, sizes) not in kinds:
                shape = _check_shape(json.loads(f"[{sizes}]"))
                kinds[dtype, sizes] = shape, math.prod(shape) * DTYPE_BITS[dtype]
            shape, bits = kinds[dtype, sizes]
            # Each entry follows the one before, in the header and in the data.
            if (match.start(), int(begin), 8 * int(end)) != (position, place, 8 * place + bits):
                return None
            if name in tensors or not name.isprintable() or len(name) > MAX_NAME:
                return None
            tensors[name] = TensorInfo(
                name, dtype, shape, path, data_start + place, None, None, identity
            )
            position, place = match.end(), int(end)
    except (KeyError, RecursionError, TypeError, ValueError):
        return None
    complete = after.startswith("}") and position == len(text) and data_start + place == size
    return tensors if complete else None


def _find_first_entry(text: str) -> int:
    """Where the first entry of a header begins: behind its brace, or behind ``__metadata__``.

    Raises:
        ValueError: if there is no brace, or ``__metadata__`` is not as usual.

    """
    if not text.startswith("{"):
        raise ValueError("no object")
    if not text.startswith(_METADATA):
        return 1
    _, end = json.JSONDecoder().raw_decode(text, len(_METADATA))
    metadata, twice = parse_json(text[len(_METADATA) : end].encode())
    comma = re.compile(", ?").match(text, end)
    if twice or not _is_metadata(metadata) or not comma:
        raise ValueError("not as usual")
    return comma.end()


def _read_entries(header: bytes, path: Path) -> dict[str, _Entry]:
    """Read any header.

    Raises:
        CheckpointError: if it is damaged.

    """
    try:
        entries, twice = parse_json(header)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header {error}; fetch it again."
        ) from error
    if twice is not None:
        raise CheckpointError(
            f"{path}: the header names {printable(twice)} twice; the file is damaged."
        )
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_metadata(metadata):
        raise CheckpointError(
            f"{path}: the header's __metadata__ is damaged: texts by name belong in it; "
            "fetch the file again."
        )
    return {name: _check_entry(name, entry, path) for name, entry in entries.items()}


def _is_metadata(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _check_entry(name: str, entry: object, path: Path) -> _Entry:
    check_name(name, path)
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [_, _] as span, **rest} if (
            not rest
        ):
            if dtype not in DTYPE_BITS:
                raise CheckpointError(
                    f"{path}: tensor {name} has the type {printable(dtype)}, which is not known; "
                    "a newer version of speculators may know it."
                )
            with suppress(TypeError, ValueError):
                return _Entry(dtype, _check_shape(shape), *check_sizes(tuple(span)))
    raise CheckpointError(
        f"{path}: the header's entry for {name} is damaged: dtype, shape and two offsets belong "
        "in it; fetch the file again."
    )


def _check_shape(shape: Iterable[object]) -> tuple[int, ...]:
    """Check sizes whose product, as in the safetensors library, must not overflow without zeros."""
    sizes = check_sizes(tuple(shape))
    check_sizes((math.prod(filter(None, sizes)),))
    return sizes


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int, path: Path) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position or end < begin:
            problem = "overlaps the tensor before it" if begin < position else "follows a gap"
            raise CheckpointError(f"{path}: the data of {name} {problem}; the file is damaged.")
        position = end
    if position != data_bytes:
        state = "truncated" if position > data_bytes else "longer than its header says"
        raise CheckpointError(
            f"{path} is {state}: its tensors take {position} bytes, "
            f"and {data_bytes} are there; fetch it again."
        )
