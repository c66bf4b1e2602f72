"""Folders and URLs that hold no checkpoint as they are: what lies there, and what to do."""

import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hub_server import HubServer, patch_hub
from speculators.checkpoint.hub.repository import HubRepository
from speculators.checkpoint.paths import local_path
from speculators.checkpoint.reader import Checkpoint, read_checkpoint
from speculators.checkpoint.repository import open_repository
from speculators.errors import CheckpointError, NoWeightsError, OutputError

WEIGHTS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2)}
CONFIG = '{"num_hidden_layers": 1}'


def read(path: Path | str) -> Checkpoint:
    return read_checkpoint(open_repository(path, one_file=True))


def told(path: Path | str) -> str:
    """The error of reading a path, which is one sentence."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    text = str(caught.value)
    assert text.isprintable()
    assert text.endswith(".")
    return text


def write(directory: Path, *files: str, config: bool = False) -> Path:
    """Write a folder: weights where a file's name is that of weights, else a few bytes."""
    for file in files:
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in {".bin", ".pt"}:
            torch.save(WEIGHTS, path)
        elif path.suffix == ".safetensors":
            save_file(WEIGHTS, path)
        else:
            path.write_bytes(b"\x80\x04N.")
    if config:
        (directory / "config.json").write_text(CONFIG)
    return directory


FOLDERS: dict[str, tuple[tuple[str, ...], bool, tuple[str, ...]]] = {
    "accelerate's state": (
        ("pytorch_model.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
        False,
        ("has no config.json", "it has weights (pytorch_model.bin)", "eagle/train/*_config.json"),
    ),
    "accelerate's state in safetensors": (
        ("model.safetensors", "optimizer.bin"),
        False,
        ("it has weights (model.safetensors)", "as config.json"),
    ),
    "DCP": (
        (".metadata", "__0_0.distcp", "__1_0.distcp"),
        True,
        ("DCP", "torch.distributed.checkpoint.format_utils dcp_to_torch {} OUTPUT"),
    ),
    "DCP without a config": ((".metadata", "__0_0.distcp"), False, ("dcp_to_torch {} ",)),
    "accelerate's FSDP": (
        ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin"),
        True,
        ("accelerate merge-weights {}/pytorch_model_fsdp_0 OUTPUT",),
    ),
    "FSDP by rank": (
        ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt", "extra_state_rank_0.pt"),
        True,
        ("shards by rank", "full state dict", "verl.model_merger"),
    ),
    "ZeRO-3": (
        (
            "latest",
            "zero_to_fp32.py",
            "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt",
            "global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ),
        True,
        ("DeepSpeed", "ZeRO stage 3", "python {}/zero_to_fp32.py {} OUTPUT"),
    ),
    "ZeRO-2 without a config": (
        ("latest", "global_step5/mp_rank_00_model_states.pt"),
        False,
        ("global_step5/mp_rank_00_model_states.pt: put config.json beside that file",),
    ),
    "tensor parallel": (
        ("global_step5/mp_rank_00_model_states.pt", "global_step5/mp_rank_01_model_states.pt"),
        True,
        ("spread over its ranks",),
    ),
    "LoRA": (
        ("adapter_config.json", "adapter_model.safetensors"),
        False,
        ("LoRA adapter", "merge_and_unload"),
    ),
    "LoRA with a config": (("adapter_config.json", "adapter_model.bin"), True, ("LoRA adapter",)),
    "a directory of that name": (
        ("pytorch_model.bin/pytorch_model-00001-of-00001.bin",),
        True,
        ("pytorch_model.bin is a directory", "move the files in it up"),
    ),
    "shards without an index": (
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        True,
        ("2 shards", "fetch model.safetensors.index.json"),
    ),
    "pickled shards without an index": (
        ("pytorch_model-00001-of-00002.bin",),
        True,
        ("fetch pytorch_model.bin.index.json",),
    ),
    "a cache": (
        ("models--org--draft/blobs/0", "models--org--draft/refs/main"),
        False,
        ("cache of the Hub's client", "give the id of a repository, such as org/draft", "{}"),
    ),
    "HF_HOME": (
        ("hub/models--org--draft/blobs/0", "token"),
        False,
        ("such as org/draft", "--cache-dir {}/hub"),
    ),
    "a repository in a cache": (
        ("blobs/0", "refs/main", f"snapshots/{'a' * 40}/config.json"),
        False,
        (f"give its id, or {{}}/snapshots/{'a' * 40}",),
    ),
    "a folder within": (
        ("README.md", "draft/config.json", "draft/model.safetensors"),
        False,
        ("its folder draft may be: give {}/draft",),
    ),
    "folders within": (
        ("a/config.json", "b/config.json"),
        False,
        ("its folders a and b may be: give {}/a",),
    ),
    "GGUF": (("draft.gguf",), True, ("draft.gguf is in a format that is not read",)),
    "another name": (
        ("draft.safetensors",),
        True,
        ("it has draft.safetensors: give {}/draft.safetensors itself",),
    ),
    "nothing": (("README.md",), False, ("give the directory that holds config.json and the wei",)),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_a_checkpoint_says_what_it_is(tmp_path: Path, kind: str) -> None:
    files, config, expected = FOLDERS[kind]
    folder = write(tmp_path / "in", *files, config=config)
    text = told(folder)
    assert text.startswith(f"{folder} has no {'weights' if config else 'config.json'}")
    for words in expected:
        assert words.replace("{}", str(folder)) in text


def test_a_directory_named_like_weights_as_input(tmp_path: Path) -> None:
    folder = write(tmp_path / "pytorch_model.bin", "pytorch_model.bin")
    assert "put the config that training was given" in told(folder)


def test_names_that_cannot_be_shown_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", "a\x1b[2J\nb.bin", "c\n/config.json")
    assert "\x1b" not in told(folder)


def test_a_folder_with_very_many_files(tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / f"{number}.txt").touch()
    assert len(open_repository(tmp_path).names()) == 2000


# DeepSpeed


def zero2(tmp_path: Path) -> dict[str, object]:
    """What ``save_checkpoint`` of ZeRO stage 2 puts into its model states."""
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    return {
        "module": model.state_dict(),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((k, v.shape) for k, v in model.state_dict().items())],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": {"last_batch_iteration": 4},
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.17.0",
    }


def test_zero_2_is_read(tmp_path: Path, log: list[str]) -> None:
    for step in (5, 10):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        torch.save(zero2(tmp_path), folder / "mp_rank_00_model_states.pt")
        torch.save(
            {"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        )
    (tmp_path / "latest").write_text("global_step10")
    (tmp_path / "config.json").write_text(CONFIG)
    tensors = read(tmp_path).tensors
    assert list(tensors) == ["weight", "bias"]
    newest = tmp_path / "global_step10" / "mp_rank_00_model_states.pt"
    assert {info.file for info in tensors.values()} == {newest}
    assert f"INFO {tmp_path} is a DeepSpeed checkpoint: global_step10/{newest.name} is read" in log
    (newest.parent / "config.json").write_text(CONFIG)
    assert list(read(newest).tensors) == ["weight", "bias"]
    assert list(read(newest.parent).tensors) == ["weight", "bias"]
    (tmp_path / "latest").write_text("../elsewhere")
    assert "has no weights" in told(tmp_path)
    optimizer = newest.with_name("zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "a part of a DeepSpeed checkpoint: let the zero_to_fp32.py" in told(optimizer)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_placeholders_of_zero_3(tmp_path: Path, file: str) -> None:
    tensors = {"fc.weight": torch.empty(0), "norm.weight": torch.ones(3)}
    if file.endswith(".bin"):
        torch.save({"module": tensors, "ds_version": "0.17.0"}, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file)
    (tmp_path / "config.json").write_text(CONFIG)
    text = told(tmp_path)
    assert "placeholder of shape (0) for fc.weight" in text
    assert "zero_to_fp32.py" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.fc.lora_A.weight", "holds a LoRA adapter"),
        ("_fsdp_wrapped_module._flat_param", "holds flattened shards of FSDP"),
    ],
)
def test_tensors_that_are_not_whole_weights(tmp_path: Path, name: str, expected: str) -> None:
    save_file({name: torch.ones(4, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(CONFIG)
    assert expected in told(tmp_path)


# Repositories on the Hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        yield server


def test_a_folder_of_a_repository(server: HubServer, tmp_path: Path) -> None:
    source = write(tmp_path / "in", "README.md", "draft/config.json", "draft/model.safetensors")
    server.add_repo("org/several", source)
    text = told("org/several")
    assert "get it with `hf download org/several --include 'draft/*' --local-dir DIR`" in text
    assert text.endswith("and give DIR/draft.")


def test_an_adapter_on_the_hub(server: HubServer, tmp_path: Path) -> None:
    source = write(tmp_path / "in", "adapter_config.json", "adapter_model.safetensors")
    server.add_repo("org/adapter", source)
    assert "it holds a LoRA adapter" in told("org/adapter")


@pytest.mark.parametrize("lacks", ["weights", "config.json", "a shard"])
def test_offline_says_that_it_is_offline(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, tmp_path: Path, lacks: str
) -> None:
    """What is not in the cache may be in the repository, so it is not said to be missing alone."""
    source = write(tmp_path / "in", "model-1.safetensors", config=True)
    index = {"weight_map": dict.fromkeys(WEIGHTS, "model-1.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    server.add_repo("org/draft", source)
    fetched = {
        "weights": ["config.json"],
        "config.json": ["model.safetensors.index.json"],
        "a shard": ["config.json", "model.safetensors.index.json"],
    }
    for name in fetched[lacks]:
        assert HubRepository("org/draft").file(name) is not None
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_HUB_OFFLINE="1")
    text = told("org/draft")
    assert "since offline mode is on: unset HF_HUB_OFFLINE" in text
    monkeypatch.undo()


# URLs and odd paths


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("https://huggingface.co/org/draft", "give the id org/draft."),
        ("https://huggingface.co/org/draft/", "give the id org/draft."),
        ("https://hf.co/org/draft/tree/main", "give the id org/draft."),
        (
            "https://huggingface.co/org/draft/tree/v2?x=1#y",
            "give the id org/draft with --revision v2.",
        ),
        (
            "https://huggingface.co/org/draft/resolve/main/model.safetensors",
            "give the id org/draft.",
        ),
        ("https://huggingface.co/org/draft/tree/main/a/b", "--include 'a/b/*' --local-dir DIR`"),
        ("hf://org/draft", "give the id org/draft."),
        ("hf://org/draft@v2", "give the id org/draft with --revision v2."),
        ("hf://org/draft/sub", "--include 'sub/*'"),
        ("https://huggingface.co/datasets/org/data", "download what it leads to"),
        ("https://example.org/draft.zip", "download what it leads to, and give the directory."),
        ("s3://bucket/draft", "is a URL; download what it leads to"),
        ("file:///tmp/draft", "is a URL"),
        ("https://user:secret@example.org/x", "https://***@example.org/x is a URL"),
        ("org/draft/sub", "if the folder sub of the repository org/draft is meant, get it with"),
        ("org/draft/sub/deeper", "--include 'sub/deeper/*'"),
    ],
)
def test_what_is_meant_by_a_url(source: str, advice: str) -> None:
    text = told(source)
    assert advice in text
    assert "secret" not in text


def test_a_path_that_exists_is_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "org" / "draft" / "sub", "model.safetensors", config=True)
    monkeypatch.chdir(tmp_path)
    assert list(read("org/draft/sub").tensors) == sorted(WEIGHTS)


@pytest.mark.parametrize(
    ("path", "told_of"),
    [
        ("~nobody-of-this-name/draft", "begins with ~ and a name that no user"),
        ("a\0b", r"The path a\x00b has bytes that are not text"),
        ("./a\0b", r"The path ./a\x00b has bytes that are not text"),
        ("caf\udce9", r"The path caf\udce9 has bytes that are not text"),
        ("./" + "x" * 5000, "xx... cannot be looked up: File name too long."),
    ],
)
def test_paths_that_cannot_be(path: str, told_of: str) -> None:
    assert told_of in told(path)
    with pytest.raises(OutputError):
        local_path(path, OutputError)


def test_weights_of_another_name_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "draft_model.pt").write_bytes(b"")
    with pytest.raises(NoWeightsError, match=r"draft_model\.pt: give .*/draft_model\.pt itself"):
        read_checkpoint(open_repository(tmp_path))
