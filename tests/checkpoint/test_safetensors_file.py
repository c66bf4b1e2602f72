"""Safetensors headers are read as the safetensors library writes them; odd ones are errors."""

import contextlib
import itertools
import json
import math
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from speculators.checkpoint.files.safetensors_file import encode_header, read_safetensors_file
from speculators.checkpoint.tensor import DTYPE_BITS, PlannedTensor, TensorInfo
from speculators.errors import CheckpointError

Header = dict[str, Any]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def file_of(path: Path, header: Header, data: bytes = b"") -> Path:
    return raw_file(path, json.dumps(header).encode(), data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# --- what is read


def planned(infos: dict[str, TensorInfo]) -> dict[str, PlannedTensor]:
    return {name: PlannedTensor.copy_of(info) for name, info in infos.items()}


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_that_torch_writes(path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    if dtype.itemsize > 1:
        tensor = tensor.repeat(1, dtype.itemsize)
    tensors = {"a": (tensor % 2 if dtype == torch.bool else tensor).view(dtype)}
    save_file(tensors, path)
    (info,) = read_safetensors_file(path).values()
    with safetensors.safe_open(path, "pt") as file:
        assert info.dtype == file.get_slice("a").get_dtype()
        assert list(info.shape) == file.get_slice("a").get_shape()
    data = path.read_bytes()[info.offset : info.offset + info.nbytes]
    assert data == tensors["a"].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_type_that_the_library_knows(path: Path, dtype: str) -> None:
    """Eight elements, so that types of 4 and 6 bits fill bytes; the library checks sizes, too."""
    size = DTYPE_BITS[dtype]
    file_of(path, {"a": entry(dtype, [2, 4], 0, size)}, bytes(range(size)))
    info = read_safetensors_file(path)["a"]
    assert (info.dtype, info.shape, info.nbytes) == (dtype, (2, 4), size)
    with safetensors.safe_open(path, "np") as file:
        assert file.get_slice("a").get_dtype() == dtype


def test_no_type_of_the_library_is_missing(path: Path) -> None:
    file_of(path, {"a": entry("Z9", [1], 0, 1)}, b"1")
    with (
        pytest.raises(safetensors.SafetensorError, match="unknown variant") as caught,
        safetensors.safe_open(path, "np"),
    ):
        pass
    known = set(re.findall(r"`([A-Z]\w*)`", str(caught.value).partition("expected")[2]))
    assert known == DTYPE_BITS.keys()


SHAPES = {
    "scalar": torch.tensor(2.5),
    "one": torch.ones(1),
    "empty": torch.empty(0),
    "empty of rank 3": torch.empty(4, 0, 3),
    "of rank 6": torch.ones(1, 2, 1, 2, 1, 2),
}


def test_scalars_and_empty_tensors(path: Path) -> None:
    save_file(SHAPES, path)
    infos = read_safetensors_file(path)
    assert {name: info.shape for name, info in infos.items()} == {
        name: tuple(tensor.shape) for name, tensor in SHAPES.items()
    }
    assert all(info.strides is None for info in infos.values())
    scalar = infos["scalar"]
    assert path.read_bytes()[scalar.offset :][:4] == struct.pack("<f", 2.5)


def test_a_file_without_tensors(path: Path) -> None:
    assert read_safetensors_file(file_of(path, {})) == {}
    assert read_safetensors_file(file_of(path, {"__metadata__": {"format": "pt"}})) == {}


def test_the_header_may_have_any_order_and_padding(path: Path) -> None:
    header = {"late": entry("U8", [2], 3, 5), "early": entry("U8", [3], 0, 3)}
    raw_file(path, json.dumps(header, indent=3).encode() + b" " * 13, b"abcde")
    infos = read_safetensors_file(path)
    data = path.read_bytes()
    assert {n: data[i.offset : i.offset + i.nbytes] for n, i in infos.items()} == {
        "late": b"de",
        "early": b"abc",
    }


def test_names_beyond_ascii(path: Path) -> None:
    save_file({"gewicht.é 権": torch.ones(2)}, path)
    assert list(read_safetensors_file(path)) == ["gewicht.é 権"]


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20),
        st.tuples(
            st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 4), max_size=4)
        ).filter(lambda it: math.prod(it[1]) * DTYPE_BITS[it[0]] % 8 == 0),
        max_size=6,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_encoded_is_read_by_us_and_by_the_library(
    path: Path, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    tensors.pop("__metadata__", None)
    infos = {
        name: TensorInfo(name, dtype, tuple(shape), path, 0)
        for name, (dtype, shape) in tensors.items()
    }
    header = encode_header(planned(infos), {"format": "pt"})
    assert len(header) % 8 == 0
    data = bytes(sum(info.nbytes for info in infos.values()))
    path.write_bytes(header + data)
    read = read_safetensors_file(path)
    assert {name: (info.dtype, info.shape) for name, info in read.items()} == {
        name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()
    }
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == tensors.keys()


def test_most_bytes_come_to_lie_on_the_same_place_of_a_page(path: Path) -> None:
    """The kernel copies such bytes fastest; the alignment that the library uses is kept."""
    infos = {
        "small": TensorInfo("small", "U8", (5000,), path, 16),
        "large": TensorInfo("large", "F32", (1000, 1000), path, 12345 * 8),
        "odd": TensorInfo("odd", "U8", (3_000_000,), path, 7),
    }
    header = encode_header(planned(infos), {})
    assert (len(header) + 5000) % 65536 == 12345 * 8 % 4096
    assert len(header) % 8 == 0
    assert len(header) < 66_000
    del infos["large"], infos["odd"]
    assert len(encode_header(planned(infos), {})) < 120  # not worth it


# --- what is refused


def good(size: int = 8) -> Header:
    return {"w": entry("F32", [2], 0, 8), "b": entry("U8", [size - 8], 8, size)}


ODD_HEADERS: dict[str, tuple[Header, str]] = {
    "overlap": ({"w": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "overlaps"),
    "same place": ({"w": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, "overlaps"),
    "gap": ({"w": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, "follows a gap"),
    "gap at the start": ({"w": entry("U8", [2], 2, 4)}, "follows a gap"),
    "beyond the end": ({"w": entry("U8", [100], 0, 100)}, "is truncated"),
    "far beyond the end": ({"w": entry("U8", [1 << 62], 0, 1 << 62)}, "is truncated"),
    "backwards": ({"w": entry("U8", [4], 8, 4)}, "cannot take -4 bytes"),
    "too many elements": ({"w": entry("F32", [3], 0, 8)}, "cannot take 8 bytes"),
    "too few elements": ({"w": entry("F32", [1], 0, 8)}, "cannot take 8 bytes"),
    "half a byte": ({"w": entry("F4", [3], 0, 1)}, "cannot take 1 bytes"),
    "unknown type": ({"w": entry("F128", [1], 0, 16)}, "the type F128, which is not known"),
    "type with an escape": ({"w": entry("\x1b[2J", [1], 0, 1)}, r"the type \x1b[2J"),
    "type is a number": ({"w": {**entry("U8", [1], 0, 1), "dtype": 8}}, "entry for w is damaged"),
    "no shape": ({"w": {"dtype": "U8", "data_offsets": [0, 1]}}, "entry for w is damaged"),
    "shape is a number": ({"w": {**entry("U8", [1], 0, 1), "shape": 1}}, "is damaged"),
    "negative size": ({"w": entry("U8", [-1, -1], 0, 1)}, "is damaged"),
    "size is a float": ({"w": {**entry("U8", [1], 0, 1), "shape": [1.0]}}, "is damaged"),
    "size is a bool": ({"w": {**entry("U8", [1], 0, 1), "shape": [True]}}, "is damaged"),
    "size is null": ({"w": {**entry("U8", [1], 0, 1), "shape": [None]}}, "is damaged"),
    "size of 100 bits": ({"w": entry("U8", [1 << 100, 0], 0, 0)}, "is damaged"),
    "product beyond any": ({"w": entry("U8", [1 << 62] * 60, 0, 8)}, "is damaged"),
    "product beyond any but for a 0": ({"w": entry("U8", [1 << 62, 4, 0], 0, 0)}, "is damaged"),
    "a hundred thousand axes": ({"w": entry("U8", [1] * 100_000, 0, 1)}, "is damaged"),
    "negative offset": ({"w": entry("U8", [2], -1, 1)}, "is damaged"),
    "offset of 100 bits": ({"w": entry("U8", [2], 1 << 100, (1 << 100) + 2)}, "is damaged"),
    "three offsets": ({"w": {**entry("U8", [1], 0, 1), "data_offsets": [0, 1, 2]}}, "is damaged"),
    "one offset": ({"w": {**entry("U8", [1], 0, 1), "data_offsets": [0]}}, "is damaged"),
    "more keys": ({"w": {**entry("U8", [1], 0, 1), "strides": [1]}}, "is damaged"),
    "metadata of numbers": ({"__metadata__": {"step": 1}}, "__metadata__ is damaged"),
    "metadata in a list": ({"__metadata__": ["pt"]}, "__metadata__ is damaged"),
    "a list": ({"w": ["U8", [1], [0, 1]]}, "is damaged"),
    "null": ({"w": None}, "is damaged"),
    "name with an escape": ({"\x1b]0;x\x07": entry("U8", [1], 0, 1)}, r"the name \x1b]0;x\x07"),
    "name over two lines": ({"a\nb": entry("U8", [1], 0, 1)}, r"the name a\nb"),
    "name of half a character": ({"a\ud800": entry("U8", [1], 0, 1)}, r"the name a\ud800"),
    "endless name": ({"a" * 100_000: entry("U8", [1], 0, 1)}, "too long"),
}


@pytest.mark.parametrize("case", ODD_HEADERS)
def test_odd_headers_are_errors(path: Path, case: str) -> None:
    header, message = ODD_HEADERS[case]
    file_of(path, header, bytes(12))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_safetensors_file(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not valid JSON"),
        (b"null", "does not hold a JSON object"),
        (b"[]", "does not hold a JSON object"),
        (b"{", "not valid JSON"),
        (b"{}}", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"w": {"dtype": "U8", "shape": [' + b"9" * 5000 + b"]}}", "not valid JSON"),
        (b'{"w": NaN}', "is damaged"),
        ('{"w": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"w": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}', "dtype"),
        (
            b'{"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "w": {}}',
            "names w twice",
        ),
    ],
    ids=lambda it: str(it[:30]),
)
def test_what_is_no_header_is_an_error(path: Path, header: bytes, message: str) -> None:
    raw_file(path, header)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_file(path)


def test_a_name_that_stands_twice_among_many(path: Path) -> None:
    names = [*map(str, range(300_000)), "77"]
    raw_file(path, b"{" + b",".join(b'"%s":0' % name.encode() for name in names) + b"}")
    with pytest.raises(CheckpointError, match="names 77 twice"):
        read_safetensors_file(path)


@pytest.mark.parametrize("length", [3, 1000, 1 << 40, (1 << 64) - 1])
def test_a_header_that_is_not_as_long_as_it_says(path: Path, length: int) -> None:
    raw_file(path, json.dumps(good(8)).encode(), bytes(8), length)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"not a safetensors file"):
            read_safetensors_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_beyond_any_is_not_read(path: Path) -> None:
    raw_file(path, b"{}", length=100_000_001)
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # a hole: it takes no space
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="more than any table of tensors needs"):
            read_safetensors_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("more", [b"", b"x"])
def test_bytes_too_few_or_too_many(path: Path, more: bytes) -> None:
    file_of(path, good(8), bytes(7) + more * 2)
    with pytest.raises(CheckpointError, match="longer than" if more else "truncated"):
        read_safetensors_file(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: download it again"),
        (b"\0\0\0", "it has only 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"PK\x03\x04" + bytes(100), "is a file that torch.save wrote: rename it"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is a file that torch.save wrote"),
        (b"\x1f\x8b\x08" + bytes(100), "is packed"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "is packed"),
        (b"GGUF" + bytes(100), "is a GGUF file"),
        (bytes(257) + b"ustar" + bytes(300), "is a tar archive"),
        (b"Entry not found", "is truncated or not a safetensors file"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_files_get_their_own_sentence(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_file(path)
    assert str(caught.value).startswith(f"{path} ")


@pytest.mark.parametrize("start", [b"PK\x03", b"\x1f\x8b\x08", b"BZh", b"\x80\x02"])
def test_a_header_whose_length_looks_like_another_file(path: Path, start: bytes) -> None:
    (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
    raw_file(path, b"{}".ljust(length))
    assert read_safetensors_file(path) == {}


# --- any damage whatever


def sample() -> bytes:
    import safetensors.torch

    tensors = {"fc.weight": torch.rand(3, 4), "b": torch.ones(2), "s": torch.tensor(1)}
    return safetensors.torch.save(tensors, {"format": "pt"})


def assert_bounded_or_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        infos = read_safetensors_file(path)
        spans = sorted((info.offset, info.offset + info.nbytes) for info in infos.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert not spans or spans[-1][1] == len(data)


fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["U8", "F4", "BF16", "dtype", "shape", "data_offsets"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "w", "__metadata__"]), inner
        )
    ),
    max_leaves=20,
)


@fuzzed
@given(st.binary(max_size=100), st.integers(0, 200))
def test_random_bytes(path: Path, data: bytes, length: int) -> None:
    assert_bounded_or_refused(path, data)
    assert_bounded_or_refused(path, struct.pack("<Q", length) + data)


@fuzzed
@given(st.dictionaries(st.sampled_from(["w", "b", "__metadata__"]), json_values), st.binary())
def test_random_headers(path: Path, header: Header, data: bytes) -> None:
    raw = json.dumps(header).encode()
    assert_bounded_or_refused(path, struct.pack("<Q", len(raw)) + raw + data)


@fuzzed
@given(st.data())
def test_mutated_files(path: Path, data: st.DataObject) -> None:
    raw = bytearray(sample())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert_bounded_or_refused(path, bytes(raw[: data.draw(st.integers(0, 2 * len(raw)))]))


def test_every_truncation(path: Path) -> None:
    whole = sample()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_safetensors_file(path)


# Large headers, and how they are laid out


def header_of(count: int) -> dict[str, object]:
    """A header of so many tensors, as a mixture of experts has them."""
    return {"__metadata__": {"format": "pt"}} | {
        f"model.layers.{i // 100}.experts.{i % 100}.weight": {
            "dtype": "BF16",
            "shape": [1, 2],
            "data_offsets": [4 * i, 4 * i + 4],
        }
        for i in range(count)
    }


LAYOUTS: dict[str, Callable[[dict[str, object]], str]] = {
    "compact": lambda header: json.dumps(header, separators=(",", ":")),
    "with blanks": json.dumps,
    "with lines": lambda header: json.dumps(header, indent=1),
    "metadata last": lambda header: json.dumps(
        dict(reversed(header.items())), separators=(",", ":")
    ),
    "no metadata": lambda header: json.dumps(
        {name: it for name, it in header.items() if name != "__metadata__"}
    ),
    "other order": lambda header: json.dumps(
        {
            name: dict(reversed(it.items())) if "shape" in it else it
            for name, it in header.items()
            if isinstance(it, dict)
        }
    ),
    "metadata with an entry's text": lambda header: json.dumps(
        header | {"__metadata__": {"a": json.dumps(header), 'b,"x"': "{}"}}, separators=(",", ":")
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_json_is_read_alike(path: Path, layout: str) -> None:
    header = header_of(300)
    raw_file(path, LAYOUTS[layout](header).encode(), bytes(4 * 300))
    found = read_safetensors_file(path)
    with safe_open(path, "np") as file:
        assert set(found) == set(file.keys())
        for name, info in found.items():
            assert [*info.shape] == file.get_slice(name).get_shape()
    start = path.stat().st_size - 4 * 300
    assert {info.offset for info in found.values()} == {start + 4 * i for i in range(300)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"model.layers.0.experts.1.weight"', '"model.layers.0.experts.0.weight"'),
        ('"dtype":"BF16","shape":[1,2]', '"shape":[1,2],"dtype":"BF16","dtype":"F32"'),
        ("},", "}"),
        ("},", "},,"),
        ("}}", "},}"),
        ("[0,4]", "[00,4]"),
        ("[1,2]", "[1,02]"),
        ("[1,2]", "[1,2,]"),
        ("[1,2]", "[1 2]"),
        ("[0,4]", "[\u0660,4]"),
        ('"format":"pt"', '"format":"pt","format":"np"'),
        ('"format":"pt"', '"format":1'),
    ],
)
def test_a_header_that_is_almost_right_is_an_error(path: Path, old: str, new: str) -> None:
    text = json.dumps(header_of(3), separators=(",", ":"))
    assert old in text
    raw_file(path, text.replace(old, new, 1).encode(), bytes(12))
    with pytest.raises(CheckpointError):
        read_safetensors_file(path)


def test_a_header_of_very_many_tensors_is_read_about_as_fast_as_by_the_library(path: Path) -> None:
    count = 100_000
    raw_file(path, json.dumps(header_of(count), separators=(",", ":")).encode(), bytes(4 * count))

    def by_the_library() -> dict[str, tuple[list[int], str]]:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (it.get_shape(), it.get_dtype()) for name, it in slices.items()}

    def seconds(action: Callable[[], object]) -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    theirs = min(seconds(by_the_library) for _ in range(2))
    assert min(seconds(lambda: read_safetensors_file(path)) for _ in range(2)) < 2 * theirs
