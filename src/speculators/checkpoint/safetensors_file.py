"""The safetensors container: eight bytes of length, a JSON header, the tensors' bytes.

Only headers are read and written here; the bytes of tensors stay where they are.
The layout is the one that the safetensors project documents in its README, "Format".
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators.checkpoint.tensor import DTYPE_BITS, TensorInfo
from speculators.errors import CheckpointError

__all__ = ["encode_header", "read_safetensors_file"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library, kept for the same files
ALIGNMENT = 8


def read_safetensors_file(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Returns:
        The tensors by name, in the header's order.

    Raises:
        CheckpointError: if the header is damaged, or the tensors it tells of do not lie one
            after the other in exactly the bytes that the file has.

    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: it has only {size} bytes; "
                "fetch it again."
            )
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: its header should take "
                f"{header_bytes} bytes, the file has {size}; fetch it again."
            )
        header = _parse_json(file.read(header_bytes), path)

    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = _check_entry(name, entry, path)
        info = TensorInfo(name, dtype, shape, path, data_start + begin)
        if info.nbytes != end - begin or info.elements * DTYPE_BITS[dtype] % 8:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(shape)} and type {dtype} cannot take "
                f"{end - begin} bytes, as its header says; the file is damaged, fetch it again."
            )
        spans.append((begin, end, name))
        tensors[name] = info
    _check_spans(sorted(spans), size - data_start, path)
    return tensors


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Encode the start of a safetensors file that holds ``tensors`` one after the other.

    The data of the tensors has to follow in the mapping's order, without gaps.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, info in tensors.items():
        end = position + info.nbytes
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = encoded + b" " * (-len(encoded) % ALIGNMENT)
    return struct.pack("<Q", len(padded)) + padded


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice} twice; the file is damaged.")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not a safetensors file: its header is not JSON; fetch it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object.")
    return header


def _check_entry(
    name: str, entry: object, path: Path
) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    def whole_numbers(value: object) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    match entry:
        case {"dtype": str(dtype), "shape": shape, "data_offsets": [_, _] as offsets, **rest} if (
            not rest and whole_numbers(shape) and whole_numbers(offsets)
        ):
            if dtype not in DTYPE_BITS:
                raise CheckpointError(
                    f"{path}: tensor {name} has the type {dtype}, which is not known; "
                    "a newer version of speculators may know it."
                )
            return dtype, tuple(shape), (offsets[0], offsets[1])
    raise CheckpointError(
        f"{path}: the header's entry for {name} is damaged: dtype, shape and two offsets belong "
        "in it; fetch the file again."
    )


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
