"""Coverage-guided fuzzing, with atheris, of the readers of untrusted files.

    python -m pip install atheris        # in an environment of its own, or with --target
    python tests/fuzz/fuzz_checkpoint.py TARGET -max_total_time=300

TARGET is one of ``TARGETS``; libFuzzer's options follow it. For any input, a reader has to return
tensors that lie within the file, or raise a CheckpointError with one printable sentence, in little
time and memory. libFuzzer keeps an input that breaks this as crash-* in the working directory; it
belongs in a new test beside the reader's others.
"""

import contextlib
import io
import json
import math
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import atheris
import safetensors

with atheris.instrument_imports(include=["speculators", "pickletools", "zipfile"]):
    from speculators.checkpoint.files.json_file import parse_json
    from speculators.checkpoint.files.pickle_data import PYTHON_GLOBALS, read_pickle
    from speculators.checkpoint.files.safetensors_file import read_safetensors_file
    from speculators.checkpoint.files.torch_file import _GLOBALS, read_torch_file
    from speculators.checkpoint.reader import read_tensors
    from speculators.checkpoint.repository import LocalDirectory
    from speculators.checkpoint.tensor import DTYPE_BITS, MAX_AXES, MAX_NAME, MAX_SIZE, TensorInfo
    from speculators.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loguru import logger

from checkpoint.hostile_pickles import (
    BROKEN,
    SIZES,
    STORAGE,
    TENSOR_V2,
    UNSAFE,
    call,
    state_dict,
    tuple_of,
    whole,
)

DATA = bytes(64)
TENSOR = call(TENSOR_V2, tuple_of(*STORAGE) + b"Q", *SIZES, b"\x89", b"N")
STATE = whole(state_dict(TENSOR))

MEMORY = Path("/dev/shm")  # files there cost little
FOLDER = (MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())) / "fuzz-checkpoint"


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Suppress the errors that a reader may raise, if they are one printable sentence."""
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 5000, len(message)


def check_bounds(tensors: Mapping[str, TensorInfo]) -> None:
    """Check that all tensors lie within their files."""
    for name, info in tensors.items():
        size = info.file.stat().st_size
        assert name == info.name
        assert name.isprintable()
        assert info.dtype in DTYPE_BITS
        assert 0 <= info.offset <= size
        reach = info.nbytes
        if info.strides is not None:
            axes = zip(info.shape, info.strides, strict=True)
            last = sum((length - 1) * stride for length, stride in axes)
            reach = (last + 1) * DTYPE_BITS[info.dtype] // 8
        assert info.elements == 0 or info.offset + reach <= size


def write(name: str, data: bytes) -> Path:
    """Write a file into the fuzzer's folder."""
    path = FOLDER / name
    path.write_bytes(data)
    return path


def likely_header(provider: atheris.FuzzedDataProvider) -> bytes:
    """Make a header of well-formed entries with arbitrary numbers."""
    header = {}
    end = 0
    for _ in range(provider.ConsumeIntInRange(0, 6)):
        begin = end if provider.ConsumeBool() else provider.ConsumeInt(2)
        end = begin + provider.ConsumeIntInRange(0, 64)
        axes = provider.ConsumeIntInRange(0, 4)
        header[provider.ConsumeUnicode(4)] = {
            "dtype": provider.PickValueInList(sorted(DTYPE_BITS)),
            "shape": provider.ConsumeIntListInRange(axes, 0, 64),
            "data_offsets": [begin, end],
        }
    return json.dumps(header).encode()


def fuzz_header(data: bytes) -> None:
    """Fuzz a safetensors header with 64 bytes behind it, or a whole file."""
    if data[:1] == b"#":
        data = likely_header(atheris.FuzzedDataProvider(data[1:]))
    framed = data[1:] if data[:1] == b"!" else struct.pack("<Q", len(data)) + data + DATA
    path = write("model.safetensors", framed)
    read = None
    with refusals():
        read = read_safetensors_file(path)
        check_bounds(read)
    check_the_library_agrees(path, read)


def read_with_the_library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Return names, types and shapes as the safetensors library reads them, if it can."""
    try:
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (it.get_dtype(), it.get_shape()) for name, it in slices.items()}
    except safetensors.SafetensorError:
        return None


def check_the_library_agrees(path: Path, read: Mapping[str, TensorInfo] | None) -> None:
    """Check that the safetensors library finds the same in a file, or ``None`` if it refuses it."""
    found = read_with_the_library(path)
    if read is not None:
        # It refuses "-0" as a whole number, and a lone surrogate in a text.
        data = path.read_bytes()
        assert found is not None or b"-0" in data or b"\\u" in data, "only the library refuses"
        assert found in (
            None,
            {name: (info.dtype, list(info.shape)) for name, info in read.items()},
        )
    elif found is not None:
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        header, twice = parse_json(path.read_bytes()[8 : 8 + size])
        header.pop("__metadata__", None)
        assert twice is not None or any(map(only_we_refuse, header, header.values()))


def only_we_refuse(name: str, entry: list[object] | dict[str, object]) -> bool:
    """Tell whether an entry is odd in a way that only the library accepts.

    The library accepts entries in lists, with keys that it does not know, names that cannot be
    shown, any number of axes, and sizes of 64 bits.
    """
    return (
        not isinstance(entry, dict)
        or len(entry) > 3
        or not name.isprintable()
        or len(name) > MAX_NAME
        or not isinstance(entry["shape"], list)
        or len(entry["shape"]) > MAX_AXES
        or math.prod(filter(None, entry["shape"])) >= MAX_SIZE
    )


def fuzz_pickle(data: bytes) -> None:
    """Fuzz a bare pickle."""
    with refusals():
        read_pickle(io.BytesIO(data), name="x", size=len(data), admitted=PYTHON_GLOBALS)


def fuzz_torch(data: bytes) -> None:
    """Fuzz a pickle within a zip archive or the legacy form, or a whole file."""
    form, data = data[:1], data[1:]
    if form == b"z":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/data/0", DATA[:16])
        data = buffer.getvalue()
    elif form == b"l":
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        rest = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + DATA[:16]
        data = b"".join(pickle.dumps(part, 2) for part in head) + data + rest
    with refusals():
        check_bounds(read_torch_file(write("pytorch_model.bin", data)))


def fuzz_index(data: bytes) -> None:
    """Fuzz an index of two shards."""
    write("model.safetensors.index.json", data)
    with refusals():
        check_bounds(read_tensors(LocalDirectory(FOLDER, "model.safetensors.index.json")))


def one_tensor(name: str) -> bytes:
    """Make a safetensors file with a tensor of two bytes."""
    header = json.dumps({name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"12"


SHARDS = {"a": "1.safetensors", "b": "2.safetensors"}
HEADERS = [
    {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}},
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        "b": {"dtype": "U8", "shape": [3, 21], "data_offsets": [1, 64]},
    },
]

PICKLES = [STATE, *(case.make("x") for case in UNSAFE.values()), *BROKEN.values()]
SMALL_PICKLES = [data for data in PICKLES if len(data) < 4000]

TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "header": (
        fuzz_header,
        [*(json.dumps(it).encode() for it in HEADERS), b"!" + one_tensor("a"), b"#" + DATA],
    ),
    "pickle": (fuzz_pickle, SMALL_PICKLES),
    "torch": (fuzz_torch, [form + data for form in (b"z", b"l", b" ") for data in SMALL_PICKLES]),
    "index": (fuzz_index, [json.dumps({"metadata": {}, "weight_map": SHARDS}).encode()]),
}
"""Name → the function to fuzz, and the inputs to start with."""

WORDS = [
    *("dtype", "shape", "data_offsets", "__metadata__", "weight_map", *DTYPE_BITS),
    *(f"c{module}\n{name}\n" for module, name in _GLOBALS),
    *("storage", "cpu", "archive/data.pkl", *SHARDS.values()),
]


def main() -> None:
    """Fuzz the target that the command line names."""
    target, *options = sys.argv[1:]
    fuzz, seeds = TARGETS[target]
    logger.remove()
    shutil.rmtree(FOLDER, ignore_errors=True)  # of the last run: libFuzzer never cleans up
    corpus = FOLDER / "corpus"
    corpus.mkdir(parents=True)
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    for name, shard in SHARDS.items():
        write(shard, one_tensor(name))
    escaped = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS)
    words = write("words", "".join(f'"{word}"\n' for word in escaped).encode())
    limits = ["-timeout=20", "-rss_limit_mb=1500", f"-dict={words}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], fuzz)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
