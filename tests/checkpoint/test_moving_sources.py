"""A source that is replaced, written to or cut off is never mixed into what is written."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import Tensors
from speculators.checkpoint.digest import sha256_of_files
from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.files.safetensors_file import read_safetensors_file
from speculators.checkpoint.files.torch_file import read_torch_file
from speculators.checkpoint.identity import FileIdentity
from speculators.checkpoint.output import writer
from speculators.checkpoint.output.writer import contiguous_chunks, write_safetensors_file
from speculators.checkpoint.reader import read_checkpoint
from speculators.checkpoint.repository import LocalDirectory
from speculators.checkpoint.tensor import Constant, PlannedTensor, TensorInfo
from speculators.errors import CheckpointError

ROWS = torch.arange(3000 * 40, dtype=torch.float32).reshape(3000, 40)
TENSORS: Tensors = {
    "a": ROWS,
    "b": -ROWS.bfloat16(),
    "c": torch.tensor(7, dtype=torch.int64),
    "left out": torch.ones(5),
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def long_ago(path: Path) -> Path:
    """Let it be an hour old: some file systems count time in steps of milliseconds."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns - 3600 * 10**9))
    return path


@pytest.fixture
def safetensors(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return long_ago(tmp_path / "model.safetensors")


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A file with a transposed tensor, which is gathered and not copied."""
    torch.save({"a": ROWS, "t": ROWS.t()}, tmp_path / "pytorch_model.bin")
    return long_ago(tmp_path / "pytorch_model.bin")


def copies(infos: dict[str, TensorInfo], *names: str) -> dict[str, PlannedTensor]:
    return {name: PlannedTensor.copy_of(infos[name]) for name in names or infos}


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 400_000)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "replaced": (replace, r"was replaced after it was first read, so it is not used; run"),
    "rewritten": (rewrite, r"was written to after it was first read"),
    "cut off": (cut, r"was written to \(it had \d+ bytes, and now has \d+\) after it"),
}
change = pytest.mark.parametrize("change", CHANGES)
hashed = pytest.mark.parametrize("hashed", [False, True])


@change
@hashed
def test_a_source_that_changed_before_the_copy(
    tmp_path: Path, safetensors: Path, change: str, hashed: bool
) -> None:
    infos = read_safetensors_file(safetensors)
    do, message = CHANGES[change]
    do(safetensors)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors {message}"):
        write_safetensors_file(tmp_path / "out", copies(infos), hashed=hashed)


@change
@hashed
@pytest.mark.parametrize("strided", [False, True])
def test_a_source_that_changes_during_the_copy(
    tmp_path: Path,
    pickled: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    hashed: bool,
    strided: bool,
) -> None:
    """It changes once it is open: an open file that is replaced is still the one that was read."""
    infos = read_torch_file(pickled)
    before = sha256(pickled)
    do, message = CHANGES[change]
    read, copy, left = os.pread, os.copy_file_range, [1]

    def then_change() -> None:
        if left and left.pop():
            do(pickled)

    def reads(*arguments: int) -> bytes:
        data = read(*arguments)
        then_change()
        return data

    def copies_(*arguments: int, **options: int) -> int:
        then_change()
        return copy(*arguments, **options)

    monkeypatch.setattr(os, "pread", reads)
    monkeypatch.setattr(os, "copy_file_range", copies_)
    name = "t" if strided else "a"
    planned = copies(infos, name)
    if change == "replaced":
        hashes = write_safetensors_file(tmp_path / "out", planned, hashed=hashed)
        assert not left
        assert torch.equal(load_file(tmp_path / "out")[name], ROWS.t() if strided else ROWS)
        assert hashes.get(pickled) == (before if hashed else None)
        return
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin {message}"):
        write_safetensors_file(tmp_path / "out", planned, hashed=hashed)
    assert not left


@change
def test_a_source_that_changed_before_it_is_read_again(safetensors: Path, change: str) -> None:
    """Validation reads it a second time, and hashes files that no tensor was copied from."""
    info = read_safetensors_file(safetensors)["a"]
    identity = {safetensors: info.identity}
    assert len(b"".join(contiguous_chunks(info))) == info.nbytes
    hashes = sha256_of_files([safetensors], lambda _: None, identity)
    assert hashes == {safetensors: sha256(safetensors)}
    do, message = CHANGES[change]
    do(safetensors)
    with pytest.raises(CheckpointError, match=message):
        list(contiguous_chunks(info))
    with pytest.raises(CheckpointError, match=message):
        sha256_of_files([safetensors], lambda _: None, identity)


@change
def test_a_strided_tensor_whose_file_changes_while_it_is_read(pickled: Path, change: str) -> None:
    info = read_torch_file(pickled)["t"]
    assert info.strides is not None
    chunks = contiguous_chunks(info, 8192)
    next(chunks)
    do, message = CHANGES[change]
    do(pickled)
    if change == "replaced":  # the open file is still the one that was read first
        assert len(b"".join(chunks)) == info.nbytes - 8192
        return
    with pytest.raises(CheckpointError, match=message):
        list(chunks)


def test_a_config_that_changes_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    identity = FileIdentity.at(tmp_path / "config.json")
    assert read_json(tmp_path / "config.json", identity=identity) == {}
    replace(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json was replaced"):
        read_json(tmp_path / "config.json", identity=identity)


def test_a_checkpoint_knows_what_its_files_were(safetensors: Path) -> None:
    config = safetensors.parent / "config.json"
    config.write_text("{}")
    checkpoint = read_checkpoint(LocalDirectory(safetensors.parent))
    files = {config: FileIdentity.at(config), safetensors: FileIdentity.at(safetensors)}
    assert checkpoint.files == files


# What is hashed


def test_hashes_are_those_of_the_files(tmp_path: Path, safetensors: Path, pickled: Path) -> None:
    planned = copies(read_safetensors_file(safetensors), "a", "b", "c")
    planned["t"] = PlannedTensor.copy_of(read_torch_file(pickled)["t"])
    zeros = PlannedTensor("F32", (2,), (Constant("zeros", "F32", bytes(8)),))
    hashes = write_safetensors_file(tmp_path / "out", planned | {"zeros": zeros}, hashed=True)
    paths = [safetensors, pickled]
    assert hashes == {path: sha256(path) for path in paths}
    found = load_file(tmp_path / "out")
    expected = {name: TENSORS[name] for name in ("a", "b", "c")}
    expected |= {"t": ROWS.t(), "zeros": torch.zeros(2)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("size", [8, 24, 4096])
def test_with_and_without_hashes_the_same_is_written(
    tmp_path: Path, safetensors: Path, pickled: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Slices, concatenations, rounded pieces and pieces that overlap, in chunks of any size."""
    infos = read_safetensors_file(safetensors)
    a, b = infos["a"], infos["b"]
    planned = {
        "rounded": PlannedTensor.copy_of(a, "BF16"),
        "widened": PlannedTensor.copy_of(b.slice(5, 17), "F32"),
        "fused": PlannedTensor("F32", (20, 40), (a.slice(10, 20), a.slice(15, 25))),
        "mixed": PlannedTensor("F32", (4, 40), (b.slice(0, 1), a.slice(2999, 3000), b.slice(1, 3))),
        "empty": PlannedTensor.copy_of(a.slice(7, 7)),
        "again": PlannedTensor.copy_of(a.slice(0, 100)),
    }
    write_safetensors_file(tmp_path / "plain", planned)
    monkeypatch.setattr(writer, "CHUNK_BYTES", size)
    hashes = write_safetensors_file(tmp_path / "hashed", planned, hashed=True)
    assert (tmp_path / "hashed").read_bytes() == (tmp_path / "plain").read_bytes()
    assert hashes[safetensors] == sha256(safetensors)
    found = load_file(tmp_path / "plain")
    assert torch.equal(found["mixed"], torch.cat((-ROWS[:1], ROWS[2999:], -ROWS[1:3])).float())


@pytest.mark.parametrize("size", [64, 1000, 1 << 20])
@pytest.mark.parametrize(
    "view",
    [
        ROWS.t(),
        ROWS[::7],
        ROWS[:, 3:5],
        ROWS[:, 3:5].t(),
        ROWS.view(30, 100, 40).permute(2, 0, 1),
        ROWS[5:6].expand(9, 40),
        ROWS.as_strided((50, 60), (2, 1), 7),
        ROWS.view(-1)[::97],
    ],
    ids=["transposed", "rows", "columns", "few rows", "permuted", "expanded", "overlap", "sparse"],
)
def test_strided_tensors_in_small_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: torch.Tensor, size: int
) -> None:
    torch.save({"x": view}, tmp_path / "x.bin")
    info = read_torch_file(tmp_path / "x.bin")["x"]
    monkeypatch.setattr(writer, "STRIDED_BYTES", size)
    chunks = list(contiguous_chunks(info, 4096))
    assert max(map(len, chunks)) <= 4096
    assert b"".join(chunks) == view.contiguous().numpy().tobytes()


# Small input, large work


def test_more_than_the_disk_holds_is_refused_before_anything_is_written(
    tmp_path: Path, safetensors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.statvfs(tmp_path)
    full = os.statvfs_result((*free[:3], 10, 10, *free[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(OSError, match=r"it takes \d+ bytes, and \d+ are free") as caught:
        write_safetensors_file(tmp_path / "out", copies(read_safetensors_file(safetensors)))
    assert caught.value.errno == 28
    assert not (tmp_path / "out").exists()


def test_a_view_that_repeats_its_elements_without_end_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "x.bin")
    infos = read_torch_file(tmp_path / "x.bin")
    with pytest.raises(
        CheckpointError, match=r"x\.bin: the tensors would take 4398046511104 bytes, while the"
    ):
        write_safetensors_file(tmp_path / "out", copies(infos))
    assert not (tmp_path / "out").exists()
