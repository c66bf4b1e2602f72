"""What lies beside the weights in a .bin is skipped by name, and never chosen in silence."""

import argparse
import datetime
import pathlib
import pickle
import struct
import types
import zipfile
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint.hostile_pickles import name, text, tuple_of, whole
from speculators.checkpoint.files.torch_file import read_torch_file
from speculators.errors import CheckpointError, UnsafeCheckpointError

WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}


class Settings:
    """An object of a class that only the script which saved it knows."""

    def __init__(self) -> None:
        self.rate, self.layers = 0.1, [1, 2]


class Attributes(dict[str, int]):
    """A dict of a class of its own, as Lightning saves hyperparameters in one."""


def save(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


BESIDE: dict[str, object] = {
    "args": argparse.Namespace(lr=0.1, path=Path("x"), when=datetime.datetime(2026, 1, 1)),
    "space": types.SimpleNamespace(a=1),
    "where": [pathlib.PurePosixPath("a/b"), Path("c")],
    "settings": Settings(),
    "hyper_parameters": Attributes(a=1),
    "queue": deque([1, 2]),
    "took": datetime.timedelta(seconds=3),
    "version": torch.torch_version.TorchVersion("2.13.0"),
}


@pytest.mark.parametrize("key", BESIDE)
@pytest.mark.parametrize("wrapped", [False, True])
def test_values_of_any_class_are_skipped_by_name(
    tmp_path: Path, log: list[str], key: str, wrapped: bool
) -> None:
    value = {"state_dict": WEIGHTS} if wrapped else dict(WEIGHTS)
    path = save(tmp_path / "x.bin", {**value, key: BESIDE[key]})
    assert list(read_torch_file(path)) == list(WEIGHTS)
    assert log == [f"DEBUG {path}: left out, as they are not among the weights: {key}"]


def test_an_optimizers_state_is_skipped(tmp_path: Path, log: list[str]) -> None:
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    value = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = save(tmp_path / "x.bin", {**value, "scheduler": scheduler.state_dict()})
    assert list(read_torch_file(path)) == ["weight", "bias"]
    assert [line.split()[0] for line in log] == ["DEBUG"]


def test_an_optimizers_state_alone_is_named(tmp_path: Path) -> None:
    _, optimizer = trained()
    path = save(tmp_path / "optimizer.bin", optimizer.state_dict())
    with pytest.raises(CheckpointError, match=r"optimizer\.bin holds no .*an optimizer's state: g"):
        read_torch_file(path)


def test_a_whole_module_of_a_script_is_told_apart(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"model": Settings()})
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        read_torch_file(path)


def test_an_object_that_may_be_a_tensor_is_not_skipped(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {**WEIGHTS, "layers.0.mlp.down_proj.weight": Settings()})
    with pytest.raises(CheckpointError, match=r"under layers\.0\.mlp\.down_proj\.weight, .*Settin"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "called",
    ["some_library.run", "some_library.module.Class", "__main__.run"],
)
def test_a_foreign_name_is_never_called(tmp_path: Path, called: str) -> None:
    """A class can be instantiated, which runs nothing here; a function would have to run."""
    module, _, attribute = called.rpartition(".")
    data = whole(b"}" + text("a") + name(module, attribute) + tuple_of(text("x")) + b"Rs")
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(UnsafeCheckpointError, match=f"asks for the global {called}, which"):
        read_torch_file(path)


# One reading


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"state_dict": WEIGHTS, "fc.bias": torch.ones(2)}, "fc.bias"),
        ({"fc.bias": torch.ones(2), "model": {"state_dict": WEIGHTS}}, "fc.bias"),
        ({"state_dict": WEIGHTS, "ema": OrderedDict(WEIGHTS)}, "ema"),
        ({**WEIGHTS, "head": {"weight": torch.ones(2)}, "epoch": 3}, "head"),
    ],
    ids=["beside", "above", "a second dict", "below"],
)
def test_tensors_beside_the_weights_are_named_in_a_warning(
    tmp_path: Path, log: list[str], value: dict[str, Any], names: str
) -> None:
    path = save(tmp_path / "x.bin", value)
    assert list(read_torch_file(path)) == list(WEIGHTS)
    [warning] = [line for line in log if line.startswith("WARNING")]
    assert warning.startswith(f"WARNING {path} also holds tensors outside of ")
    assert warning.endswith(f", which are left out: {names}")


def two_views(*kinds: str, count: bytes = b"K\x02") -> bytes:
    """A state dict of tensors of these storage classes, on one storage."""
    body = b"}"
    for number, kind in enumerate(kinds):
        storage = (text("storage"), name("torch", kind), text("0"), text("cpu"), count)
        layout = (b"K\x00", tuple_of(count), tuple_of(b"K\x01"), b"\x89", b"N")
        rebuild = name("torch._utils", "_rebuild_tensor_v2")
        tensor = rebuild + tuple_of(tuple_of(*storage) + b"Q", *layout) + b"R"
        body += text(f"t{number}") + tensor + b"s"
    return whole(body)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize(
    "kinds", [("FloatStorage", "IntStorage"), ("HalfStorage", "BFloat16Storage")]
)
def test_one_storage_of_two_types_is_an_error(
    tmp_path: Path, kinds: tuple[str, str], form: str
) -> None:
    """torch.load reads both tensors with the type of the first."""
    path, data = tmp_path / "x.bin", bytes(8 if kinds[0] == "FloatStorage" else 4)
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", two_views(*kinds))
            archive.writestr("archive/data/0", data)
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
        parts = [pickle.dumps(item, 2) for item in head]
        end = pickle.dumps(["0"], 2) + struct.pack("<q", 2) + data
        path.write_bytes(b"".join(parts) + two_views(*kinds) + end)
    with pytest.raises(CheckpointError, match=r"has the storage 0 as \w+ and as \w+, so what it"):
        read_torch_file(path)


def test_an_empty_storage_has_any_type(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl", two_views("FloatStorage", "IntStorage", count=b"K\x00")
        )
        archive.writestr("archive/data/0", b"")
    assert [info.dtype for info in read_torch_file(path).values()] == ["F32", "I32"]
