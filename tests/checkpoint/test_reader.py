"""Directories of weights in every file format, single files, and malicious indexes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers import Tensors
from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.reader import (
    Checkpoint,
    read_checkpoint,
    read_config,
    read_names,
    read_tensors,
)
from speculators.checkpoint.repository import LocalDirectory, open_repository
from speculators.checkpoint.tensor import TensorInfo
from speculators.errors import CheckpointError

TENSORS: Tensors = {
    "fc.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "fc.bias": torch.arange(3, dtype=torch.bfloat16),
    "scale": torch.tensor(2.5, dtype=torch.float16),
    "nothing": torch.empty(0, 4, dtype=torch.int32),
}
SHARDS = (("fc.weight", "nothing"), ("fc.bias", "scale"))


def save_bin(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path)


def save_legacy_bin(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


Save = Callable[[Tensors, Path], None]
FORMS: dict[str, tuple[str, Save]] = {
    "safetensors": ("model.safetensors", save_file),
    "zip bin": ("pytorch_model.bin", save_bin),
    "legacy bin": ("pytorch_model.bin", save_legacy_bin),
}
form = pytest.mark.parametrize("form", FORMS)


def write_index(directory: Path, filename: str, weight_map: object) -> Path:
    index = directory / f"{filename}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def write_sharded(directory: Path, form: str = "safetensors") -> Path:
    filename, save = FORMS[form]
    stem, suffix = filename.rsplit(".", 1)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(SHARDS, 1):
        shard = f"{stem}-0000{number}-of-00002.{suffix}"
        save({name: TENSORS[name] for name in names}, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    return write_index(directory, filename, weight_map)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "draft"
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 1}')
    return directory


def read(path: Path) -> Checkpoint:
    return read_checkpoint(open_repository(path, one_file=True))


def value(info: TensorInfo) -> bytes:
    return b"".join(contiguous_chunks(info))


def assert_all_there(tensors: dict[str, TensorInfo], expected: Tensors = TENSORS) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].shape == tuple(tensor.shape)
        assert value(tensors[name]) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


# --- every container


@form
def test_one_file(directory: Path, form: str) -> None:
    filename, save = FORMS[form]
    save(TENSORS, directory / filename)
    checkpoint = read(directory)
    assert checkpoint.name == str(directory)
    assert checkpoint.config == {"num_hidden_layers": 1}
    assert_all_there(checkpoint.tensors)


@form
def test_shards(directory: Path, form: str) -> None:
    write_sharded(directory, form)
    tensors = read(directory).tensors
    assert_all_there(tensors)
    assert len({info.file for info in tensors.values()}) == 2


@form
def test_a_file_of_any_name_is_input(directory: Path, form: str) -> None:
    filename, save = FORMS[form]
    save({"x": torch.ones(1)}, directory / filename)  # what would be read of the directory
    path = directory / f"epoch_3.{filename.rsplit('.', 1)[1]}"
    save(TENSORS, path)
    checkpoint = read(path)
    assert checkpoint.name == str(path)
    assert checkpoint.config_file == directory / "config.json"
    assert_all_there(checkpoint.tensors)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_what_files_of_torch_save_are_called(directory: Path, suffix: str) -> None:
    torch.save(TENSORS, directory / f"draft{suffix}")
    assert_all_there(read(directory / f"draft{suffix}").tensors)


@form
def test_an_index_is_input(directory: Path, form: str) -> None:
    index = write_sharded(directory, form)
    FORMS[form][1]({"x": torch.ones(1)}, directory / FORMS[form][0])
    assert_all_there(read(index).tensors)


def test_an_index_of_the_one_usual_file(directory: Path) -> None:
    save_file(TENSORS, directory / "model.safetensors")
    index = write_index(directory, "model.safetensors", dict.fromkeys(TENSORS, "model.safetensors"))
    assert_all_there(read(index).tensors)


def test_a_file_without_a_config_beside_it(directory: Path) -> None:
    (directory / "config.json").unlink()
    save_file(TENSORS, directory / "draft.safetensors")
    with pytest.raises(
        CheckpointError, match=r"draft\.safetensors has no config\.json beside it, so it is not"
    ):
        read(directory / "draft.safetensors")


@pytest.mark.parametrize("name", ["config.json", "draft.gguf", "draft.onnx", "x.index.json", "bin"])
def test_a_file_of_another_kind(directory: Path, name: str) -> None:
    (directory / name).write_text("{}")
    with pytest.raises(
        CheckpointError,
        match=rf"{name} is a file; give the directory that holds config\.json, or in it a file of "
        r"weights \(its name ends in one of \.safetensors, \.bin, \.pt, \.pth, \.ckpt\)",
    ):
        read(directory / name)


def test_where_no_file_will_do(directory: Path) -> None:
    save_file(TENSORS, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is a file; give the directory"):
        open_repository(directory / "model.safetensors")


def test_a_revision_of_what_is_here_is_told_to_mean_nothing(
    directory: Path, log: list[str]
) -> None:
    open_repository(directory)
    assert log == []
    open_repository(directory, revision="v2")
    assert log == [f"WARNING {directory} is on this machine, so the revision v2 is ignored"]


def test_no_weights(directory: Path) -> None:
    save_file(TENSORS, directory / "draft.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"draft has no weights: none of model\.safetensors, model\.safetensors\.index\.json, "
        r"pytorch_model\.bin, pytorch_model\.bin\.index\.json is there; it has draft\.safetensors: "
        r"give .*/draft\.safetensors itself",
    ):
        read(directory)


# --- more than one container


@pytest.mark.parametrize(
    "present",
    [
        ["model.safetensors", "pytorch_model.bin"],
        ["model.safetensors.index.json", "pytorch_model.bin"],
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"],
    ],
    ids=lambda present: f"{len(present)} with {present[0]}",
)
def test_safetensors_come_first_and_it_is_said(
    directory: Path, log: list[str], present: list[str]
) -> None:
    if "model.safetensors.index.json" in present:
        write_sharded(directory)
    for name in present:
        if name == "model.safetensors":
            save_file(TENSORS, directory / name)
        elif not (directory / name).exists():
            (directory / name).write_text("not even a pickle")
    assert_all_there(read(directory).tensors)
    assert log == [f"INFO {directory} has {' and '.join(present)}: {present[0]} is read"]


def test_a_shard_may_be_called_like_the_only_file(directory: Path, log: list[str]) -> None:
    """As llm-compressor leaves a model whose MTP it adds."""
    first, *others = TENSORS
    save_file({first: TENSORS[first]}, directory / "model.safetensors")
    save_file({name: TENSORS[name] for name in others}, directory / "model_mtp.safetensors")
    files = {first: "model.safetensors"} | dict.fromkeys(others, "model_mtp.safetensors")
    write_index(directory, "model.safetensors", files)
    assert_all_there(read(directory).tensors)
    assert read_names(LocalDirectory(directory)) == TENSORS.keys()
    assert log == []


def test_nothing_is_said_of_one_container_or_of_parts(directory: Path, log: list[str]) -> None:
    write_sharded(directory)
    read(directory)
    (directory / "pytorch_model.bin").write_text("not even a pickle")
    read(directory / "model.safetensors.index.json")
    read_tensors(LocalDirectory(directory), only=("fc.bias",))
    assert log == []


# --- some tensors only


def test_only_the_shards_with_them_are_opened(directory: Path) -> None:
    write_sharded(directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    tensors = read_tensors(LocalDirectory(directory), only=("scale", "lm_head.weight"))
    assert tensors.keys() == {"scale"}
    assert read_tensors(LocalDirectory(directory), only=("lm_head.weight",)) == {}


def test_of_a_shard_with_more_than_the_index_names_the_wanted_is_read(directory: Path) -> None:
    """This matters for a verifier, of which only a few tensors are needed."""
    index = write_sharded(directory)
    content = json.loads(index.read_text())
    del content["weight_map"]["fc.bias"]
    index.write_text(json.dumps(content))
    assert read_tensors(LocalDirectory(directory), only=("scale",)).keys() == {"scale"}
    with pytest.raises(CheckpointError, match=r"holds the tensor fc\.bias"):
        read_tensors(LocalDirectory(directory))


# --- indexes with tricks


def edited_map(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(index: Path) -> None:
        content = json.loads(index.read_text())
        edit(content["weight_map"])
        index.write_text(json.dumps(content))

    return spoil


def put_first(shard: object) -> Callable[[Path], None]:
    return edited_map(lambda weight_map: weight_map.update({"fc.weight": shard}))


def written(text: str) -> Callable[[Path], object]:
    return lambda index: index.write_text(text)


FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def a_directory_as_shard(index: Path) -> None:
    (index.parent / FIRST).unlink()
    (index.parent / FIRST).mkdir()


ODD_INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda i: (i.parent / FIRST).unlink(), f"has no {FIRST}, which"),
    "shard is a directory": (a_directory_as_shard, f"has no {FIRST}, which"),
    "shard damaged": (
        lambda i: (i.parent / FIRST).write_bytes(b"12345"),
        f"{FIRST} is truncated or not a safetensors file",
    ),
    "tensor in no shard": (
        edited_map(lambda m: m.update({"ghost": SECOND})),
        f"says that {SECOND} holds the tensor ghost, but it does not",
    ),
    "tensor in the other shard": (
        put_first(SECOND),
        f"{FIRST} holds the tensor fc.weight, but model.safetensors.index.json puts it into "
        + SECOND,
    ),
    "tensor in two shards": (
        lambda i: save_file(
            {name: TENSORS[name] for name in ("fc.weight", "fc.bias", "scale")}, i.parent / SECOND
        ),
        f"{SECOND} holds the tensor fc.weight, but model.safetensors.index.json puts it into "
        + FIRST,
    ),
    "tensor not in the map": (
        edited_map(lambda m: m.pop("scale")),
        f"{SECOND} holds the tensor scale, but model.safetensors.index.json does not name it",
    ),
    "parent": (
        put_first(f"../{FIRST}"),
        f"'../{FIRST}', which is not a file name in its directory",
    ),
    "parent, there and back": (put_first(f"../draft/{FIRST}"), "is not a file name"),
    "absolute": (put_first("/etc/passwd"), "'/etc/passwd', which is not a file name"),
    "folder": (put_first(f"folder/{FIRST}"), "is not a file name"),
    "trailing slash": (put_first("folder/"), "'folder/', which is not a file name"),
    "dot": (put_first("."), "is not a file name"),
    "two dots": (put_first(".."), "is not a file name"),
    "empty": (put_first(""), "is not a file name"),
    "NUL": (put_first("a\0b"), r"'a\\x00b', which is not a file name"),
    "line break": (put_first("a\nb"), r"'a\\nb', which is not a file name"),
    "number": (put_first(1), "'1', which is not a file name"),
    "list": (put_first([FIRST]), "is not a file name"),
    "null": (put_first(None), "'None', which is not a file name"),
    "endless": (put_first("x" * 100_000), "xxx...', which is not a file name"),
    "no map": (written("{}"), "has no weight_map from tensor names to files"),
    "map is a list": (written('{"weight_map": []}'), "has no weight_map"),
    "map is empty": (written('{"weight_map": {}}'), "has no weight_map"),
    "no JSON": (written("{"), "index.json is not valid JSON"),
    "a list": (written("[]"), "index.json does not hold a JSON object"),
    "endless nesting": (written("[" * 200_000), "is not valid JSON"),
    "a name twice": (
        written(f'{{"weight_map": {{"fc.weight": "{FIRST}", "fc.weight": "{SECOND}"}}}}'),
        "index.json has the key fc.weight twice",
    ),
    "the map twice": (
        written('{"weight_map": {"a": "b"}, "weight_map": {"a": "c"}}'),
        "index.json has the key weight_map twice",
    ),
    "name with an escape": (
        edited_map(lambda m: m.update({"\x1b[2J": FIRST})),
        r"index.json has a tensor of the name \x1b[2J",
    ),
}


@pytest.mark.parametrize("case", ODD_INDEXES)
def test_odd_indexes_are_errors(directory: Path, case: str) -> None:
    spoil, message = ODD_INDEXES[case]
    index = write_sharded(directory)
    spoil(index)
    with pytest.raises(CheckpointError) as caught:
        read(directory)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith(".")


def test_the_shard_of_another_container_is_not_read(directory: Path) -> None:
    torch.save(TENSORS, directory / "pytorch_model.bin")
    write_index(directory, "model.safetensors", dict.fromkeys(TENSORS, "pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"is a file that torch\.save wrote"):
        read(directory / "model.safetensors.index.json")


# --- links


def test_a_shard_that_is_a_link_out_of_the_directory_is_not_followed(directory: Path) -> None:
    write_sharded(directory)
    outside = directory.parent / "secret.safetensors"
    shutil.move(directory / FIRST, outside)
    (directory / FIRST).symlink_to(outside)
    with pytest.raises(
        CheckpointError,
        match=r"is a link that leads out of its directory, to .*secret\.safetensors",
    ):
        read(directory)


def test_a_shard_that_is_a_link_through_a_linked_directory_is_not_followed(directory: Path) -> None:
    write_sharded(directory)
    (directory.parent / "else").mkdir()
    (directory / "sub").symlink_to(directory.parent / "else")
    shutil.move(directory / FIRST, directory / "sub" / "x")
    (directory / FIRST).symlink_to("sub/x")
    with pytest.raises(CheckpointError, match="is a link that leads out"):
        read(directory)


def test_links_within_the_directory_and_to_it_are_followed(directory: Path) -> None:
    write_sharded(directory)
    shutil.move(directory / FIRST, directory / "first")
    (directory / FIRST).symlink_to("first")
    link = directory.parent / "link"
    link.symlink_to(directory)
    assert_all_there(read(directory).tensors)
    assert_all_there(read(link).tensors)


def test_the_files_that_the_user_names_may_be_links(directory: Path) -> None:
    elsewhere = directory.parent / "elsewhere.safetensors"
    save_file(TENSORS, elsewhere)
    (directory / "model.safetensors").symlink_to(elsewhere)
    assert_all_there(read(directory).tensors)
    assert_all_there(read(directory / "model.safetensors").tensors)


@pytest.mark.parametrize("where", ["snapshot", "beside an old client's cache"])
def test_a_cache_of_the_hub_is_made_of_links(directory: Path, where: str) -> None:
    """``snapshots/<commit>/<file>`` is a link to ``blobs/<hash>``."""
    write_sharded(directory)
    repository = directory.parent / "hub" / "models--org--draft"
    snapshot = repository / "snapshots" / ("0" * 40) if where == "snapshot" else directory / "local"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.glob("*.*"))):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    assert_all_there(read(snapshot).tensors)
    assert_all_there(read(snapshot / "model.safetensors.index.json").tensors)


# --- configs


def test_a_key_that_stands_twice_in_a_config_is_told(directory: Path, log: list[str]) -> None:
    (directory / "config.json").write_text('{"vocab_size": 1, "rope": {}, "vocab_size": 2}')
    config, path = read_config(LocalDirectory(directory))
    assert config["vocab_size"] == 2
    assert log == [f"WARNING {path} has the key vocab_size twice, and the last one counts"]


def test_a_config_larger_than_any_is_not_read(directory: Path) -> None:
    with (directory / "config.json").open("r+b") as file:
        file.truncate(1 << 30)  # a hole: it takes no space
    with pytest.raises(
        CheckpointError, match=r"config\.json has more than 32 MiB, which no config"
    ):
        read_config(LocalDirectory(directory))


# --- any index whatever


names = st.sampled_from(["fc.weight", "fc.bias", "scale", "nothing", "ghost", "", "a\nb"])
places = st.sampled_from([FIRST, SECOND, "config.json", "..", "", "/x", None, 3]) | st.text()


@given(st.dictionaries(names, places) | st.none() | st.lists(places))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_indexes(directory: Path, weight_map: object) -> None:
    if not (directory / FIRST).exists():
        write_sharded(directory)
    write_index(directory, "model.safetensors", weight_map)
    right = {name: FIRST if name in SHARDS[0] else SECOND for name in TENSORS}
    if weight_map == right:
        assert_all_there(read(directory).tensors)
        return
    with pytest.raises(CheckpointError):
        read(directory)
