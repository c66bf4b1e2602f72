"""Where the tensors of a file that ``torch.save`` wrote are, without torch or reading their data.

Such a file is a pickle that describes tensors, and the raw bytes of their storages: entries of a
zip archive (since PyTorch 1.6), or one after another behind the pickle (the legacy form). The
pickle is read as data (see ``pickle_data``), so finding each tensor's bytes takes constant memory
and runs nothing.

Layout facts: ``_save`` and ``_legacy_save`` in PyTorch's ``torch/serialization.py``, and the
rebuild functions in ``torch/_utils.py``.
"""

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple, cast

from loguru import logger

from speculators.checkpoint.files.other_files import refuse_other_files
from speculators.checkpoint.files.pickle_data import (
    MALFORMED,
    PYTHON_GLOBALS,
    Builder,
    Ignored,
    Instance,
    Items,
    Refused,
    read_pickle,
)
from speculators.checkpoint.identity import FileIdentity, open_unchanged
from speculators.checkpoint.tensor import MAX_SIZE, TensorInfo, check_name, check_sizes
from speculators.errors import CheckpointError, printable

__all__ = ["read_torch_entries", "read_torch_file"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts, Lightning and DeepSpeed put a dict of weights."""

MAX_WRAPPERS = 2
MAX_ZIP_DIRECTORY = 8 << 20

ZIP_MAGIC = b"PK\x03\x04"
ZIP_ENCRYPTED = 0x1
ZIP_UTF8 = 0x800
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

OTHER_FILES = {
    rb'(?s:.{8})\{"': "is a safetensors file: rename it to end in .safetensors.",
}
"""More of ``other_files.OTHER_FILES``."""


class _Dtype(NamedTuple):
    """A dtype: PyTorch's name, safetensors' name, size in bytes, storage class."""

    name: str
    stored: str | None
    size: int
    storage: str | None = None


_DTYPES = [
    _Dtype("bfloat16", "BF16", 2, "BFloat16Storage"),
    _Dtype("bool", "BOOL", 1, "BoolStorage"),
    _Dtype("complex64", "C64", 8, "ComplexFloatStorage"),
    _Dtype("float16", "F16", 2, "HalfStorage"),
    _Dtype("float32", "F32", 4, "FloatStorage"),
    _Dtype("float64", "F64", 8, "DoubleStorage"),
    _Dtype("float8_e4m3fn", "F8_E4M3", 1),
    _Dtype("float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    _Dtype("float8_e5m2", "F8_E5M2", 1),
    _Dtype("float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
    _Dtype("float8_e8m0fnu", "F8_E8M0", 1),
    _Dtype("int16", "I16", 2, "ShortStorage"),
    _Dtype("int32", "I32", 4, "IntStorage"),
    _Dtype("int64", "I64", 8, "LongStorage"),
    _Dtype("int8", "I8", 1, "CharStorage"),
    _Dtype("uint16", "U16", 2),
    _Dtype("uint32", "U32", 4),
    _Dtype("uint64", "U64", 8),
    _Dtype("uint8", "U8", 1, "ByteStorage"),
    # safetensors has no names for these: they may only occur beside the weights.
    _Dtype("complex128", None, 16, "ComplexDoubleStorage"),
    _Dtype("complex32", None, 4),
    _Dtype("float4_e2m1fn_x2", None, 1),
]


@dataclass(frozen=True, eq=False, slots=True)
class _StorageClass:
    dtype: _Dtype


@dataclass(frozen=True, eq=False, slots=True)
class _Storage:
    """One block of bytes that tensors view."""

    key: str
    dtype: _Dtype
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class _Tensor:
    """A tensor as its pickle describes it; fields of type ``object`` are not checked yet."""

    storage: _Storage
    dtype: _Dtype
    offset: object
    shape: object
    strides: object
    metadata: tuple[object, ...]


class _Span(NamedTuple):
    """Where bytes are in the file."""

    start: int
    size: int


class _Content(NamedTuple):
    """What a file holds: the pickled value, and where each storage's bytes are, by key."""

    value: object
    spans: dict[str, _Span]


def read_torch_file(path: Path) -> dict[str, TensorInfo]:
    """List the tensors of a file that ``torch.save`` wrote, in its order.

    A dict of tensors under one of ``WRAPPERS`` is unwrapped. What else is beside the tensors
    (optimizer state, epoch numbers, arguments) is left out and named in a debug line of the log;
    other tensors there are named in a warning.

    Raises:
        UnsafeCheckpointError: its pickle asks for more than tensors and plain values.
        CheckpointError: the file cannot be read, is damaged, is not a dict of tensors, or has a
            tensor that safetensors files cannot hold.

    """
    value, spans, identity = _read(path)
    tensors = _find_tensors(value, path)
    return {
        name: _tensor_info(name, tensor, spans, path, identity) for name, tensor in tensors.items()
    }


def read_torch_entries(path: Path) -> dict[str, object]:
    """The entries of the dict that ``torch.save`` wrote; of a lone tensor, one with an empty name.

    Returns:
        Key → a ``TensorInfo``, or a plain value. Keys that are not strings are left out.

    Raises:
        UnsafeCheckpointError: its pickle asks for more than tensors and plain values.
        CheckpointError: the file cannot be read, is damaged, or has a tensor that safetensors files
            cannot hold.

    """
    value, spans, identity = _read(path)
    entries = [("", value)] if isinstance(value, _Tensor) else _pairs(value)
    return {
        key: _tensor_info(key, item, spans, path, identity) if isinstance(item, _Tensor) else item
        for key, item in entries
        if isinstance(key, str)
    }


def _read(path: Path) -> tuple[object, dict[str, _Span], FileIdentity]:
    """The pickled value of a file, where its storages are, and which file it is."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or is not a file: check the path.")
    try:
        with open_unchanged(path, None) as raw:
            identity = FileIdentity.at(raw.fileno())
            file = io.BufferedReader(cast("io.RawIOBase", raw))
            refuse_other_files(file, path, OTHER_FILES)
            read = _read_zip if file.read(2) == b"PK" else _read_legacy
            file.seek(0)
            value, spans = read(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check it.") from error
    return value, spans, identity


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({what}): download it or save it again.")


def _rebuild_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    *rest: object,  # requires_grad, hooks, metadata: older versions wrote fewer
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor views a storage")
    return _Tensor(storage, storage.dtype, offset, shape, strides, metadata=rest[2:])


def _rebuild_v3(*arguments: object) -> _Tensor:
    # For dtypes without a storage class: the dtype itself follows the hooks.
    *as_v2, dtype = arguments[:7]
    if not isinstance(dtype, _Dtype):
        raise TypeError("a tensor has a type")
    return replace(_rebuild_v2(*as_v2, *arguments[7:]), dtype=dtype)


_GLOBALS: dict[tuple[str, str], object] = {
    **PYTHON_GLOBALS,
    ("torch._utils", "_rebuild_tensor"): Builder(_rebuild_v2),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_rebuild_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): Builder(lambda tensor, *_: tensor),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(lambda tensor, *_: tensor),
    ("torch.nn.parameter", "Parameter"): Builder(lambda tensor, *_: tensor),
    ("torch", "Size"): Builder(lambda sizes: sizes),
    ("torch.torch_version", "TorchVersion"): Builder(lambda *_: Instance("TorchVersion")),
    ("torch", "device"): Builder(lambda *_: Ignored("torch.device")),
    ("torch.serialization", "_get_layout"): Builder(lambda _: Ignored("torch.layout")),
    ("torch.storage", "UntypedStorage"): _StorageClass(_Dtype("uint8", "U8", 1)),
    **{("torch", dtype.name): dtype for dtype in _DTYPES},
    **{("torch", dtype.storage): _StorageClass(dtype) for dtype in _DTYPES if dtype.storage},
}


class _Storages(dict[str, _Storage]):
    """The storages that the persistent ids of a file's pickle name, by key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, persistent_id: object) -> _Storage:
        match persistent_id:
            case ("storage", _StorageClass(dtype=dtype), str(key), str(), int(count), *view):
                # The sixth field was for views of storages, which nothing writes any more.
                if count < 0 or view not in ([], [None]):
                    raise ValueError("not a whole storage")
                storage = _Storage(key, dtype, count * dtype.size)
                first = self.setdefault(key, storage)
                if first.nbytes != storage.nbytes:
                    raise ValueError("one storage has two sizes")
                # torch.load would read both as the first; torch.save writes no such file.
                if first.dtype != dtype and storage.nbytes:
                    raise CheckpointError(
                        f"{self.path} has the storage {printable(key)} as {first.dtype.name} and "
                        f"as {dtype.name}, so what it holds depends on who reads it: save the "
                        "weights again."
                    )
                return storage
        raise Refused("a persistent id that names no storage")


class _CautiousReader(io.BufferedReader):
    """A file that does not allocate memory just because a damaged length asks for it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_ZIP_DIRECTORY:
            raise ValueError("no zip directory of a checkpoint is that large")
        return super().read(size)


def _read_zip(file: IO[bytes], path: Path) -> _Content:
    entries = _zip_entries(file, path)
    prefix = next(iter(entries), "").partition("/")[0]
    pickled = entries.get(f"{prefix}/data.pkl")
    if pickled is None:
        raise CheckpointError(
            f"{path} is a zip archive without a data.pkl, so torch.save did not write it: check "
            "that it is the checkpoint itself."
        )
    byteorder = entries.get(f"{prefix}/byteorder", _Span(0, 0))
    file.seek(byteorder.start)
    if file.read(min(byteorder.size, 16)) not in (b"", b"little"):
        raise _big_endian(path)
    file.seek(pickled.start)
    value = read_pickle(
        file, name=str(path), size=pickled.size, admitted=_GLOBALS, persistent=_Storages(path).add
    )
    if file.tell() != pickled.start + pickled.size:
        raise _damaged(path, "its pickle ends before its entry does")
    data = f"{prefix}/data/"
    spans = {name[len(data) :]: at for name, at in entries.items() if name.startswith(data)}
    return _Content(value, spans)


def _zip_entries(file: IO[bytes], path: Path) -> dict[str, _Span]:
    """Where each entry's bytes are, according to the entries' own headers.

    Zip readers disagree about odd archives, so only those with one reading are accepted: the
    directory lists what the file holds, each entry once and without overlaps. Checksums are not
    verified, because ``torch.save`` can be told to leave them out.
    """
    try:
        raw = io.FileIO(file.fileno(), closefd=False)
        with _CautiousReader(raw) as reader, zipfile.ZipFile(reader) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, *MALFORMED):
        raise _damaged(path, "it has no readable zip directory at its end") from None
    entries: dict[str, _Span] = {}
    size, end = os.fstat(file.fileno()).st_size, 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ZIP_ENCRYPTED:
            raise CheckpointError(
                f"{path} is a compressed or encrypted archive, whose tensors cannot be copied as "
                "they are: load it and save it again with torch.save."
            )
        # The first entry must begin the file: anything before it would be hidden.
        if info.header_offset < end or bool(info.header_offset) != bool(entries):
            raise _damaged(path, "its zip entries overlap, or something lies before them")
        if info.header_offset > size or info.file_size != info.compress_size:
            raise _damaged(path, "its zip directory has wrong sizes")
        file.seek(info.header_offset)
        signature, name_size, extra_size = struct.unpack("<4s22xHH", file.read(30).ljust(30))
        encoding = "utf-8" if info.flag_bits & ZIP_UTF8 else "cp437"
        if (signature, file.read(name_size)) != (ZIP_MAGIC, info.orig_filename.encode(encoding)):
            raise _damaged(path, "its zip directory and its entries disagree")
        start = info.header_offset + 30 + name_size + extra_size
        end = start + info.file_size
        entries[info.orig_filename] = _Span(start, info.file_size)
    if end > size:
        raise _damaged(path, "it is shorter than its zip entries")
    one_prefix = len({name.partition("/")[0] for name in entries}) <= 1
    if not one_prefix or len({name.casefold() for name in entries}) < len(infos):
        raise _damaged(path, "its zip entries have ambiguous names")
    return entries


def _read_legacy(file: IO[bytes], path: Path) -> _Content:
    size = os.fstat(file.fileno()).st_size
    storages = _Storages(path)

    def read() -> object:
        left = size - file.tell()
        return read_pickle(
            file, name=str(path), size=left, admitted=_GLOBALS, persistent=storages.add
        )

    if read() != LEGACY_MAGIC or read() != LEGACY_PROTOCOL:
        raise CheckpointError(
            f"{path} is a pickle that torch.save did not write: load it where it was made, and "
            "save the weights with torch.save(model.state_dict(), ...)."
        )
    if ("little_endian", True) not in _pairs(read()):
        raise _big_endian(path)
    value, keys = read(), read()
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise _damaged(path, "it has no list of storages")
    if sorted(keys) != sorted(storages):
        raise _damaged(path, "it does not list the storages that its tensors need")
    spans: dict[str, _Span] = {}
    end = file.tell()
    for key in keys:
        storage = storages[key]
        file.seek(end)
        count = int.from_bytes(file.read(8), "little")
        spans[key] = _Span(end + 8, storage.nbytes)
        end += 8 + storage.nbytes
        if count * storage.dtype.size != storage.nbytes or end > size:
            raise _damaged(path, "its storages are not as large as its pickle says")
    if end < size:
        raise _damaged(path, f"{size - end} bytes follow its last tensor")
    return _Content(value, spans)


def _big_endian(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds big-endian data: load it with PyTorch, and save it on a little-endian "
        "machine."
    )


def _find_tensors(value: object, path: Path) -> dict[str, _Tensor]:
    """Find the one dict of tensors in ``value``: itself, or one under keys of ``WRAPPERS``."""
    left_out: list[tuple[object, object]] = []
    where = "its top"
    for depth in reversed(range(MAX_WRAPPERS + 1)):
        wrapped = _wrapped(value, depth)
        if len(wrapped) > 1:
            raise CheckpointError(
                f"{path} holds tensors under {' and '.join(map(repr, wrapped))}: save only the "
                "wanted ones, with torch.save."
            )
        for wrapper, inner in wrapped.items():
            left_out += [(key, item) for key, item in _pairs(value) if key != wrapper]
            value, where = inner, repr(wrapper)
    tensors: dict[str, _Tensor] = {}
    for key, item in _pairs(value):
        if isinstance(item, Instance) and isinstance(key, str) and "." in key:
            raise CheckpointError(
                f"{path} holds under {printable(key)}, where tensors are, an object of the class "
                f"{item.kind}, which may be one: save plain tensors, with torch.save."
            )
        if not isinstance(item, _Tensor):
            left_out.append((key, item))
        elif isinstance(key, str) and key not in tensors:
            tensors[key] = item
        else:
            raise CheckpointError(
                f"{path} holds a tensor under the key {_shown(key)}, where distinct names are "
                "needed: save the weights with torch.save(model.state_dict(), ...)."
            )
    if not tensors:
        raise CheckpointError(f"{path} holds no dict of tensors{_what_instead(value)}")
    others = [key for key, item in left_out if _has_tensors(item)]
    if others:
        logger.warning(
            f"{path} also holds tensors outside of {where}, which are left out: {_listed(others)}"
        )
    if left_out:
        names = _listed([key for key, _ in left_out])
        logger.debug("{}: left out, as they are not among the weights: {}", path, names)
    return tensors


def _what_instead(value: object) -> str:
    """What a file without weights holds, and what to do; the end of a sentence."""
    keys = {key for key, _ in _pairs(value) if isinstance(key, str)}
    if {"state", "param_groups"} <= keys:
        return ", but an optimizer's state: give the file of the weights, which is saved beside it."
    if "optimizer_state_dict" in keys:
        return (
            ", but a part of a DeepSpeed checkpoint: let the zero_to_fp32.py that is saved with it "
            "make weights of its folder."
        )
    return (
        f", neither at its top nor under one of {', '.join(WRAPPERS)}: save the weights with "
        "torch.save(model.state_dict(), ...)."
    )


def _has_tensors(value: object) -> bool:
    """Whether a value is a tensor, or a dict of tensors by name."""
    return isinstance(value, _Tensor) or any(
        isinstance(key, str) and isinstance(item, _Tensor) for key, item in _pairs(value)
    )


def _listed(keys: list[object]) -> str:
    return ", ".join(map(_shown, keys[:20])) + (", ..." if len(keys) > 20 else "")


def _wrapped(value: object, depth: int) -> dict[str, object]:
    """Key of ``WRAPPERS`` → what ``value`` has there, if that holds tensors, at most that deep."""
    inner = {key: item for key, item in _pairs(value) if isinstance(key, str) and key in WRAPPERS}
    return {
        key: item
        for key, item in inner.items()
        if depth
        and (
            any(isinstance(tensor, _Tensor) for _, tensor in _pairs(item))
            or _wrapped(item, depth - 1)
        )
    }


def _pairs(value: object) -> list[tuple[object, object]]:
    return value.pairs if isinstance(value, Items) else []


def _shown(key: object) -> str:
    return printable(key) if isinstance(key, str) else f"<{type(key).__name__}>"


def _tensor_info(
    name: str, tensor: _Tensor, spans: dict[str, _Span], path: Path, identity: FileIdentity
) -> TensorInfo:
    """Check what the pickle says about a tensor against the bytes that the file has for it."""
    check_name(name, path)
    which = f"{path} is not readable, for its tensor {printable(name)}"
    storage, dtype = tensor.storage, tensor.dtype
    if dtype.stored is None:
        raise CheckpointError(
            f"{which} is of type {dtype.name}, which safetensors files cannot hold: convert it to "
            "another type and save it again."
        )
    if any(map(_pairs, tensor.metadata)):
        raise CheckpointError(
            f"{which} is a lazily conjugated or negated view: save it again after resolve_conj() "
            "and resolve_neg()."
        )
    try:
        layout = (tensor.shape, tensor.strides, (tensor.offset,))
        shape, strides, (offset,) = map(check_sizes, layout)
        steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
        needed = offset + sum(steps) + 1 if all(shape) else 0
        span = spans[storage.key]
        fits = needed * dtype.size <= span.size == storage.nbytes
        # With strides of zero, a small storage could pass for a tensor of any size.
        fits &= math.prod(shape) * dtype.size < MAX_SIZE
    except (LookupError, TypeError, ValueError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{which} does not fit the bytes that the file has for it: download it or save it "
            "again."
        )
    return TensorInfo(
        name=name,
        dtype=dtype.stored,
        shape=shape,
        file=path,
        offset=span.start + offset * dtype.size if needed else span.start,
        strides=strides if needed and not _row_major(shape, strides) else None,
        identity=identity,
    )


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements are contiguous in row-major order; axes of size 1 have any stride."""
    stride = 1
    for size, actual in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and actual != stride:
            return False
        stride *= size
    return True
