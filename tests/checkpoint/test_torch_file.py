"""Files written by torch.save are listed as torch.load would load them, or refused."""

import contextlib
import io
import itertools
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger
from torch import nn

from checkpoint.hostile_pickles import BROKEN, UNSAFE, name, text, tuple_of, whole
from speculators.checkpoint.files.torch_file import read_torch_file
from speculators.checkpoint.tensor import DTYPE_BITS, TensorInfo
from speculators.errors import CheckpointError, UnsafeCheckpointError

FORMS = {"zip": True, "legacy": False}


@pytest.fixture(params=FORMS)
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    def save(value: object, protocol: int = 2) -> Path:
        path = tmp_path / "pytorch_model.bin"
        new = FORMS[request.param]
        torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        return path

    return save


@pytest.fixture
def debug_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logger.add(lambda line: lines.append(str(line)), level="DEBUG", format="{message}")
    yield lines
    logger.remove(handler)


def stored_bytes(info: TensorInfo) -> bytes:
    """The tensor's elements in row-major order, read from the file where ``info`` says."""
    size = DTYPE_BITS[info.dtype] // 8
    array: np.ndarray[Any, Any] = np.ndarray(
        info.shape,
        dtype=f"V{size}",
        buffer=info.file.read_bytes(),
        offset=info.offset,
        strides=info.strides and [stride * size for stride in info.strides],
    )
    return array.tobytes()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def safetensors_dtype(dtype: torch.dtype) -> str:
    data = safetensors.torch.save({"x": torch.empty(1).to(dtype)})
    (length,) = struct.unpack("<Q", data[:8])
    found: str = json.loads(data[8 : 8 + length])["x"]["dtype"]
    return found


def assert_as_loaded(path: Path, loaded: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    infos = read_torch_file(path)
    assert list(infos) == list(loaded)
    for key, tensor in loaded.items():
        info = infos[key]
        assert (info.name, info.file, info.shape) == (key, path, tuple(tensor.shape))
        assert info.dtype == safetensors_dtype(tensor.dtype)
        assert stored_bytes(info) == tensor_bytes(tensor)
        assert (info.strides is None) == tensor.is_contiguous()
    return infos


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    torch.float8_e8m0fnu,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(save: Callable[..., Path], dtype: torch.dtype) -> None:
    value = {"x": torch.arange(6).reshape(2, 3).to(dtype), "y": torch.ones(3).to(dtype)}
    # Not compared with torch.load, which cannot read its own legacy files of the newer dtypes.
    assert_as_loaded(save(value), value)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol(save: Callable[..., Path], protocol: int) -> None:
    path = save(nn.TransformerEncoderLayer(8, 2, 16).state_dict(), protocol)
    assert_as_loaded(path, load(path))


base = torch.arange(24, dtype=torch.float32)
VIEWS = {
    "scalar": torch.tensor(2.5),
    "one": torch.ones(1),
    "empty": torch.empty(0),
    "empty of rank 3": torch.empty(4, 0, 3),
    "empty slice": base[24:],
    "shared": base,
    "shared again": base,
    "slice": base[5:11],
    "every second": base[::2],
    "matrix": base.view(4, 6),
    "transposed": base.view(4, 6).t(),
    "column": base.view(4, 6)[:, 2:3],
    "row": base.view(4, 6)[2:3],
    "transposed row": base.view(24, 1).t(),
    "permuted": base.view(2, 3, 4).permute(2, 0, 1),
    "expanded": base[3:4].expand(5),
    "expanded matrix": base[:3].expand(2, 3),
    "expanded once": base[:3].expand(1, 3),
    "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "overlapping": base.as_strided((3, 4), (2, 1), 7),
    "last element": base[23],
}


def test_views_share_one_storage(save: Callable[..., Path]) -> None:
    path = save(VIEWS)
    infos = assert_as_loaded(path, load(path))
    assert infos["shared"].offset == infos["shared again"].offset == infos["matrix"].offset
    assert infos["slice"].offset == infos["shared"].offset + 5 * 4
    assert infos["transposed"].strides == (1, 6)
    assert infos["expanded"].strides == (0,)


def test_parameters_and_buffers(save: Callable[..., Path]) -> None:
    tagged = nn.Parameter(torch.rand(3))
    tagged.tag = {"parallel": True}  # type: ignore[attr-defined]
    frozen = nn.Parameter(torch.arange(3), requires_grad=False)
    tensor = torch.rand(2, 2, requires_grad=True)
    path = save({"a": nn.Parameter(torch.rand(2)), "b": tagged, "c": frozen, "d": tensor})
    assert_as_loaded(path, load(path))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_untyped_storage_and_first_type_wins_in_the_legacy_form(save: Callable[..., Path]) -> None:
    tensor = torch.rand(5)
    path = save({"raw": torch.rand(3).untyped_storage(), "typed": tensor.storage(), "x": tensor})
    assert_as_loaded(path, {"x": tensor})


def test_tensors_from_the_builtin_constructors_of_old_files(tmp_path: Path) -> None:
    tensor = tuple_of(
        tuple_of(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x02")
        + b"Q",
        *(b"K\x00", tuple_of(b"K\x02"), tuple_of(b"K\x01")),
    )
    old = name("torch._utils", "_rebuild_tensor") + tensor + b"R"
    parameter = name("torch.nn.parameter", "Parameter") + tuple_of(old) + b"\x81"
    path = zipped(tmp_path, whole(b"}" + text("w") + parameter + b"s"), {"data/0": b"abcdefgh"})
    (info,) = read_torch_file(path).values()
    assert stored_bytes(info) == b"abcdefgh"


def test_a_device_elsewhere_does_not_matter(tmp_path: Path) -> None:
    pickled = state_pickle({"w": (0, (2,), (1,))}).replace(b"cpu", b"gpu")
    assert read_torch_file(zipped(tmp_path, pickled, {"data/0": bytes(8)}))["w"].shape == (2,)


# --- what lies beside the tensors


def beside() -> dict[str | int, object]:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    return {
        "epoch": 3,
        "loss": 0.5,
        "best": np.float64(0.25),
        "rng": np.random.RandomState(0).get_state(),
        "name": "draft",
        "nothing": None,
        "flags": [True, {"a": (1, 2)}],
        "seen": {1, 2},
        "optimizer": optimizer.state_dict(),
        "shape": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "layout": torch.strided,
        "bytes": b"\xff",
        "wide": [torch.zeros(2, dtype=torch.complex128)],
        7: "a number",
    }


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_wrappers_are_opened(
    save: Callable[..., Path], debug_lines: list[str], wrapper: str
) -> None:
    weights = nn.Linear(3, 2).state_dict()
    path = save({**beside(), wrapper: weights})
    assert_as_loaded(path, weights)
    (line,) = debug_lines
    assert line.strip().endswith(
        "epoch, loss, best, rng, name, nothing, flags, seen, optimizer, shape, dtype, device, "
        "layout, bytes, wide, <int>"
    )


def test_wrappers_within_wrappers(save: Callable[..., Path], debug_lines: list[str]) -> None:
    weights = nn.Linear(3, 2).state_dict()
    path = save({"step": 1, "model": {"args": None, "state_dict": weights}})
    assert_as_loaded(path, weights)
    assert debug_lines[0].strip().endswith("step, args")


def test_values_among_the_tensors(save: Callable[..., Path], debug_lines: list[str]) -> None:
    weights = nn.Linear(3, 2).state_dict()
    path = save({**weights, **beside(), "model": {"hidden_size": 3}})
    assert_as_loaded(path, dict(weights))
    assert "epoch" in debug_lines[0]
    assert "model" in debug_lines[0]


def test_plain_weights_log_nothing(save: Callable[..., Path], debug_lines: list[str]) -> None:
    state_dict = nn.Linear(3, 2).state_dict()
    assert isinstance(state_dict, OrderedDict)
    assert hasattr(state_dict, "_metadata")
    read_torch_file(save(state_dict))
    assert debug_lines == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"model": torch.ones(1), "state_dict": None}}, "holds no dict of tensors"),
        ({"epoch": 3}, "holds no dict of tensors"),
        ({}, "holds no dict of tensors"),
        (torch.ones(1), "holds no dict of tensors"),
        ([torch.ones(1)], "holds no dict of tensors"),
        ("text", "holds no dict of tensors"),
        ({"layers": {"0": {"w": torch.ones(1)}}}, "holds no dict of tensors"),
        ({0: torch.ones(1)}, "under the key <int>"),
        ({"a": torch.ones(1), None: torch.ones(1)}, "under the key <NoneType>"),
        ({("a", "b"): torch.ones(1)}, "under the key <tuple>"),
        (
            {"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}},
            "under 'model' and 'state_dict'",
        ),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "a is of type complex128"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated or negated"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "conjugated or negated"),
        ({"a\ud800": torch.ones(2)}, r"a tensor of the name a\\ud800, which"),
    ],
    ids=str,
)
def test_other_contents_are_errors(save: Callable[..., Path], value: object, message: str) -> None:
    path = save(value)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert not isinstance(caught.value, UnsafeCheckpointError)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.ones(2, 2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.ones(2, device="meta")}, "torch._utils._rebuild_meta_tensor_no_storage"),
    ],
    ids=["module", "sparse", "meta"],
)
def test_what_torch_writes_beyond_tensors_is_refused(
    save: Callable[..., Path], value: object, named: str
) -> None:
    with pytest.raises(UnsafeCheckpointError, match=re.escape(named)):
        read_torch_file(save(value))


# --- files that are something else


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html>404</html>", "is a web page"),
        (b"<html></html>", "is a web page"),
        (safetensors.torch.save({"w": torch.ones(1)}), "is a safetensors file"),
        (b"\x1f\x8b\x08" + bytes(100), "is packed"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "is packed"),
        (b"GGUF" + bytes(100), "is a GGUF file"),
        (b'{"error": "not found"}', "was not written by torch.save"),
        (b"Entry not found", "was not written by torch.save"),
        (bytes(1000), "was not written by torch.save"),
        (b"PK\x05\x06" + bytes(18), r"a zip archive without a data\.pkl"),
        (b"PK", "no readable zip directory"),
        (b"PK\x03\x04", "no readable zip directory"),
        (pickle.dumps({"w": 1}), "is a pickle that torch.save did not write"),
        (pickle.dumps([1, 2]), "is a pickle that torch.save did not write"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_files_get_their_own_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(f"{path} ")


def test_a_tar_archive_of_old(tmp_path: Path) -> None:
    """torch.load opens one whatever its name is, and runs its pickles."""
    sentinel = tmp_path / "sentinel"
    payload = UNSAFE["os.system"].make(str(sentinel))
    path = tmp_path / "pytorch_model.bin"
    with tarfile.open(path, "w") as archive:
        for entry in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(entry)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    with pytest.raises(CheckpointError, match="is a tar archive"):
        read_torch_file(path)
    assert not sentinel.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_torchscript_archive(tmp_path: Path) -> None:
    """A zip with a data.pkl and code, which torch.load hands to torch.jit."""
    path = tmp_path / "pytorch_model.bin"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(CheckpointError, match="is a compressed or encrypted archive"):
        read_torch_file(path)
    pickled = entries_of(path)["pytorch_model/data.pkl"]
    with pytest.raises(UnsafeCheckpointError, match=r"the global __torch__\.torch\.nn"):
        read_torch_file(zipped(tmp_path, pickled))


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.bin", tmp_path / "a\0b"):
        with pytest.raises(CheckpointError, match="missing or is not a file"):
            read_torch_file(path)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        read_torch_file(path)


def test_a_plain_pickle_of_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"w": torch.ones(1)}))
    with pytest.raises(UnsafeCheckpointError, match=r"torch\.storage\._load_from_bytes"):
        read_torch_file(path)


# --- hostile pickles, in each place where a file has one


def zipped(directory: Path, pickled: bytes, entries: dict[str, bytes] | None = None) -> Path:
    path = directory / "zip.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in {"data.pkl": pickled, **(entries or {})}.items():
            archive.writestr(f"archive/{entry}", data)
    return path


def legacy(directory: Path, pickled: bytes, rest: bytes = b"", little: bool = True) -> Path:
    path = directory / "legacy.bin"
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": little}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + pickled + rest)
    return path


def bare(directory: Path, pickled: bytes) -> Path:
    path = directory / "model.safetensors.bin"
    path.write_bytes(pickled)
    return path


@pytest.mark.parametrize("place", [zipped, legacy, bare])
@pytest.mark.parametrize("case", UNSAFE)
def test_hostile_pickles_are_refused_by_name(
    tmp_path: Path, case: str, place: Callable[[Path, bytes], Path]
) -> None:
    sentinel = tmp_path / "sentinel"
    modules = set(sys.modules)
    path = place(tmp_path, UNSAFE[case].make(str(sentinel)))
    with pytest.raises(UnsafeCheckpointError, match=re.escape(UNSAFE[case].refused)) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(f"{path} was refused, and nothing in it was run")
    assert not sentinel.exists()
    new = set(sys.modules) - modules
    assert all(module.startswith("encodings.") for module in new)  # of the entries' names


PLACES = (zipped, legacy, bare)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        pytest.param(case, place, marks=() if place is chosen else pytest.mark.exhaustive)
        for case, chosen in zip(BROKEN, itertools.cycle(PLACES), strict=False)
        for place in PLACES
    ],
)
def test_damaged_pickles_are_errors(
    tmp_path: Path, case: str, place: Callable[[Path, bytes], Path]
) -> None:
    """Each in one of the places; exhaustive: in all of them."""
    path = place(tmp_path, BROKEN[case])
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_pickle_behind_the_first_is_an_error(tmp_path: Path) -> None:
    good = state_pickle({"w": (0, (2,), (1,))})
    payload = UNSAFE["os.system"].make(str(tmp_path / "sentinel"))
    with pytest.raises(CheckpointError, match="its pickle ends before its entry does"):
        read_torch_file(zipped(tmp_path, good + payload, {"data/0": bytes(8)}))
    with pytest.raises(UnsafeCheckpointError, match=r"os\.system"):
        read_torch_file(legacy(tmp_path, good + payload))
    assert not (tmp_path / "sentinel").exists()


# --- descriptions that do not fit the bytes


def state_pickle(
    tensors: dict[str, tuple[Any, Any, Any]], count: Any = 2, cls: str = "FloatStorage"
) -> bytes:
    """A pickle of tensors (offset, shape, strides) of one storage of ``count`` elements."""

    def value(raw: object) -> bytes:
        return pickle.dumps(raw, 2)[2:-1]

    storage = tuple_of(*map(text, ("storage",)), name("torch", cls), *map(value, ("0", "cpu")))
    storage = storage[:-1] + value(count) + b"tQ"
    v2 = name("torch._utils", "_rebuild_tensor_v2")
    body = b"}"
    for key, layout in tensors.items():
        arguments = tuple_of(storage, *map(value, layout), b"\x89", b"N")
        body += text(key) + v2 + arguments + b"Rs"
    return b"\x80\x02" + body + b"."


BAD_LAYOUTS: dict[str, tuple[Any, Any, Any]] = {
    "too long": (0, (3,), (1,)),
    "offset beyond": (1, (2,), (1,)),
    "strides beyond": (0, (2,), (2,)),
    "negative offset": (-1, (1,), (1,)),
    "negative size": (0, (-1,), (1,)),
    "negative stride": (1, (2,), (-1,)),
    "more strides": (0, (2,), (1, 1)),
    "fewer strides": (0, (2, 1), (1,)),
    "float size": (0, (2.0,), (1,)),
    "bool size": (0, (True,), (1,)),
    "text size": (0, ("2",), (1,)),
    "sizes in a list": (0, [2], [1]),
    "no sizes": (0, None, None),
    "text offset": ("0", (2,), (1,)),
    "huge size": (0, (1 << 64,), (1,)),
    "huge number": (0, (1 << 2000,), (0,)),
    "huge expanded": (0, (1 << 40, 1 << 40), (0, 0)),
    "axes": (0, (1,) * 65, (1,) * 65),
    "a hundred thousand axes": (0, (1,) * 100_000, (1,) * 100_000),
}


@pytest.mark.parametrize("layout", BAD_LAYOUTS)
def test_layouts_outside_the_storage_are_errors(tmp_path: Path, layout: str) -> None:
    path = zipped(tmp_path, state_pickle({"w": BAD_LAYOUTS[layout]}), {"data/0": bytes(8)})
    with pytest.raises(CheckpointError, match="its tensor w does not fit the bytes"):
        read_torch_file(path)


@pytest.mark.parametrize("size", [0, 4, 7, 9, 16])
def test_a_storage_of_another_size_is_an_error(tmp_path: Path, size: int) -> None:
    pickled = state_pickle({"w": (0, (1,), (1,))})
    with pytest.raises(CheckpointError, match="does not fit the bytes"):
        read_torch_file(zipped(tmp_path, pickled, {"data/0": bytes(size)}))
    keys = pickle.dumps(["0"], 2)
    with pytest.raises(CheckpointError, match=r"not as large as its pickle says|follow its last"):
        read_torch_file(legacy(tmp_path, pickled, keys + struct.pack("<q", 2) + bytes(size)))


def test_a_storage_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit the bytes"):
        read_torch_file(zipped(tmp_path, state_pickle({"w": (0, (1,), (1,))}), {"data/1": b"12"}))


@pytest.mark.parametrize("count", [-1, 1 << 64, 1 << 2000, 2.0, "2", None])
def test_storage_counts_that_make_no_sense(tmp_path: Path, count: object) -> None:
    path = zipped(tmp_path, state_pickle({"w": (0, (1,), (1,))}, count), {"data/0": bytes(8)})
    with pytest.raises(CheckpointError):
        read_torch_file(path)


def test_one_storage_of_two_sizes_is_an_error(tmp_path: Path) -> None:
    two = state_pickle({"a": (0, (1,), (1,))})[:-1], state_pickle({"b": (0, (1,), (1,))}, 3)[3:]
    with pytest.raises(CheckpointError, match="makes no sense"):
        read_torch_file(zipped(tmp_path, b"".join(two), {"data/0": bytes(8)}))


def test_one_name_for_two_tensors_is_an_error(tmp_path: Path) -> None:
    two = state_pickle({"w": (0, (1,), (1,))})[:-1], state_pickle({"w": (1, (1,), (1,))})[3:]
    with pytest.raises(CheckpointError, match="under the key w, where distinct names are"):
        read_torch_file(zipped(tmp_path, b"".join(two), {"data/0": bytes(8)}))


def test_views_of_storages_in_old_legacy_files_are_errors(tmp_path: Path) -> None:
    whole_storage = state_pickle({"w": (0, (1,), (1,))}).replace(b"tQ", b"NtQ")
    rest = pickle.dumps(["0"], 2) + struct.pack("<q", 2) + bytes(8)
    assert list(read_torch_file(legacy(tmp_path, whole_storage, rest))) == ["w"]
    view = whole_storage.replace(b"NtQ", tuple_of(text("1"), b"K\x00", b"K\x01") + b"tQ")
    with pytest.raises(CheckpointError, match="makes no sense"):
        read_torch_file(legacy(tmp_path, view, rest))


# --- the legacy form's own parts


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (b"", "makes no sense"),
        (pickle.dumps("0", 2), "no list of storages"),
        (pickle.dumps([0], 2), "no list of storages"),
        (pickle.dumps([[]], 2), "no list of storages"),
        (pickle.dumps([], 2), "does not list the storages"),
        (pickle.dumps(["0", "0"], 2), "does not list the storages"),
        (pickle.dumps(["0", "1"], 2), "does not list the storages"),
        (pickle.dumps(["0"], 2), "not as large"),
        (pickle.dumps(["0"], 2) + struct.pack("<q", -2) + bytes(8), "not as large"),
        (pickle.dumps(["0"], 2) + struct.pack("<q", 1 << 62) + bytes(8), "not as large"),
        (pickle.dumps(["0"], 2) + struct.pack("<q", 2) + bytes(7), "not as large"),
        (pickle.dumps(["0"], 2) + struct.pack("<q", 2) + bytes(9), "1 bytes follow"),
    ],
)
def test_damaged_legacy_files_are_errors(tmp_path: Path, rest: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(legacy(tmp_path, state_pickle({"w": (0, (1,), (1,))}), rest))


def test_legacy_storages_beyond_any_file_are_errors(tmp_path: Path) -> None:
    pickled = state_pickle({"w": (0, (1,), (1,))}, 1 << 63)
    rest = pickle.dumps(["0"], 2) + struct.pack("<Q", 1 << 63)
    with pytest.raises(CheckpointError, match="not as large"):
        read_torch_file(legacy(tmp_path, pickled, rest))


def test_big_endian_files_are_errors(tmp_path: Path) -> None:
    pickled = state_pickle({"w": (0, (1,), (1,))})
    for path in (
        legacy(tmp_path, pickled, little=False),
        zipped(tmp_path, pickled, {"data/0": bytes(8), "byteorder": b"big"}),
    ):
        with pytest.raises(CheckpointError, match="big-endian"):
            read_torch_file(path)


# --- zip archives with tricks


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.arange(4.0), "b": torch.ones(2)}, path)
    return path


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def test_any_prefix_and_other_writers(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "repacked.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("épreuve/") if sys.version_info >= (3, 11) else None
        for entry, data in reversed(entries_of(saved).items()):
            archive.writestr(entry.replace("pytorch_model", "épreuve"), data)
        archive.comment = b"a harmless comment"
    assert_as_loaded(path, load(saved))


def test_checksums_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_as_loaded(path, load(path))


def test_a_zip64_archive(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "zip64.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries_of(saved).items():
            with archive.open(entry, "w", force_zip64=True) as file:
                file.write(data)
    assert_as_loaded(path, load(saved))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives_are_errors(saved: Path, tmp_path: Path, method: int) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w", method) as archive:
        for entry, data in entries_of(saved).items():
            archive.writestr(entry, data)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        read_torch_file(path)


def patched(path: Path, where: int, new: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[where : where + len(new)] = new
    path.write_bytes(data)
    return path


def central(path: Path, entry: str) -> int:
    """The offset at which the central directory describes ``entry``."""
    return path.read_bytes().rindex(entry.encode()) - 46


TRICKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "encrypted flag": (
        lambda p: patched(p, central(p, "pytorch_model/data.pkl") + 8, b"\x09\x08"),
        "compressed or encrypted",
    ),
    "local name differs": (lambda p: patched(p, 30, b"q"), "directory and its entries disagree"),
    "central name differs": (
        lambda p: patched(p, central(p, "pytorch_model/data.pkl") + 46, b"q"),
        "directory and its entries disagree",
    ),
    "name cut by a NUL": (
        lambda p: patched(p, central(p, "pytorch_model/data.pkl") + 46 + 18, b"\0"),
        "directory and its entries disagree",
    ),
    "local signature": (
        lambda p: patched(p, p.read_bytes().index(b"PK\x03\x04", 4), b"XX"),
        "directory and its entries disagree",
    ),
    "larger than the file": (
        lambda p: patched(
            p, central(p, "pytorch_model/.data/serialization_id") + 20, b"\xff\xff\xff\x7f" * 2
        ),
        "shorter than its zip entries",
    ),
    "larger than the entry": (
        lambda p: patched(p, central(p, "pytorch_model/data/0") + 24, b"\xff\xff\xff\x7f"),
        "wrong sizes",
    ),
    "zip64 size without zip64": (
        lambda p: patched(p, central(p, "pytorch_model/data/0") + 20, b"\xff" * 8),
        "no readable zip directory|overlap",
    ),
    "two entries at one place": (
        lambda p: patched(p, central(p, "pytorch_model/data/1") + 42, bytes(4)),
        "overlap|disagree",
    ),
    "prepended": (lambda p: p.write_bytes(b"PK\x03\x04 junk" + p.read_bytes()), "lies before"),
    "prepended pickle": (
        lambda p: p.write_bytes(UNSAFE["os.system"].make(str(p) + ".run") + p.read_bytes()),
        r"os\.system",
    ),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-30]), "no readable zip directory"),
    "cut in half": (
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "no readable zip directory",
    ),
    "other extract version": (
        lambda p: patched(p, central(p, "pytorch_model/data/0") + 6, b"\xff\x00"),
        "no readable zip directory",
    ),
}


@pytest.mark.parametrize("field", ["header_offset", "file_size", "compress_size", "both"])
@pytest.mark.parametrize("number", [1 << 40, 1 << 62, (1 << 64) - 1])
def test_zip64_numbers_beyond_the_file_are_errors(tmp_path: Path, field: str, number: int) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_pickle({"w": (0, (1,), (1,))}))
        archive.writestr("archive/data/0", bytes(8))
        # Closing the archive writes these into the directory, as zip64 fields.
        for name_ in ["file_size", "compress_size"] if field == "both" else [field]:
            setattr(archive.infolist()[-1], name_, number)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_torch_file(path)


def test_a_directory_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = zipped(tmp_path, whole(b"}"))
    end = path.read_bytes()[-22:]
    (start,) = struct.unpack("<I", end[16:20])
    # The file has a hole of a gigabyte, and claims that all of it is its directory.
    with path.open("r+b") as file:
        file.seek(start + (1 << 30))
        file.write(end[:12] + struct.pack("<IIH", 1 << 30, start, 0))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="no readable zip directory"):
            read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("trick", TRICKS)
def test_zip_tricks_are_errors(saved: Path, trick: str) -> None:
    change, message = TRICKS[trick]
    change(saved)
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(saved)
    assert not Path(f"{saved}.run").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("pytorch_model/data.pkl", "ambiguous names"),
        ("pytorch_model/DATA.PKL", "ambiguous names"),
        ("pytorch_model/data/0", "ambiguous names"),
        ("other/data.pkl", "ambiguous names"),
        ("data.pkl", "ambiguous names"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_second_pickle_in_the_archive_is_an_error(
    saved: Path, tmp_path: Path, entry: str, message: str, first: bool
) -> None:
    sentinel = tmp_path / "sentinel"
    extra = [(entry, UNSAFE["os.system"].make(str(sentinel)))]
    entries = list(entries_of(saved).items())
    with zipfile.ZipFile(saved, "w") as archive:
        for name_, data in extra + entries if first else entries + extra:
            archive.writestr(name_, data)
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(saved)
    assert not sentinel.exists()


def test_a_pickle_of_another_case_is_not_the_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/Data.pkl", whole(b"}"))
    with pytest.raises(CheckpointError, match=r"without a data\.pkl"):
        read_torch_file(path)


def test_what_a_comment_holds_is_not_read(saved: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    with zipfile.ZipFile(saved, "a") as archive:
        archive.comment = UNSAFE["os.system"].make(str(sentinel))
    assert_as_loaded(saved, load(saved))
    assert not sentinel.exists()


# --- any damage whatever


def samples() -> list[bytes]:
    found = []
    for new in FORMS.values():
        buffer = io.BytesIO()
        value = {"model": {"w": torch.rand(3, 4).t(), "b": nn.Parameter(torch.ones(2))}, "step": 3}
        torch.save(value, buffer, _use_new_zipfile_serialization=new)
        found.append(buffer.getvalue())
    return found


def assert_bounded_or_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        for info in read_torch_file(path).values():
            strides = info.strides or np.ones(info.shape, "V1").strides
            steps = [(n - 1) * stride for n, stride in zip(info.shape, strides, strict=True)]
            end = info.offset + (sum(steps) + 1) * DTYPE_BITS[info.dtype] // 8
            assert 0 <= info.offset <= len(data)
            assert info.elements == 0 or end <= len(data)


fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)


@fuzzed
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", *samples()]))
def test_random_bytes(tmp_path: Path, data: bytes, start: bytes) -> None:
    assert_bounded_or_refused(tmp_path / "x.bin", start + data)


@fuzzed
@given(st.sampled_from(samples()), st.data())
def test_mutated_files(tmp_path: Path, sample: bytes, data: st.DataObject) -> None:
    raw = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert_bounded_or_refused(
        tmp_path / "x.bin", bytes(raw[: data.draw(st.integers(0, 2 * len(raw)))])
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_truncation(tmp_path: Path, form: str) -> None:
    sample = samples()[list(FORMS).index(form)]
    for size in range(len(sample)):
        path = tmp_path / "x.bin"
        path.write_bytes(sample[:size])
        with pytest.raises(CheckpointError):
            read_torch_file(path)


def test_torch_is_not_needed() -> None:
    script = (
        "import sys, speculators.checkpoint.files.torch_file; "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
