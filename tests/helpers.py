"""Shared by several tests: golden vectors, checkpoints and verifiers on disk, the command line."""

import json
import multiprocessing.context
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = (
    "llama31_gqa_nobias",
    "qwen2_qkv_bias",
    "rope_linear",
    "ttt_layernorms",
    "vicuna_default_bias",
)
PLAIN = "llama31_gqa_nobias"
"""The golden checkpoint whose only feature is an embedding: ten tensors."""

WRITTEN = ["README.md", "config.json", "conversion.json", "model.safetensors"]
"""The files of a converted checkpoint."""

TOLERANCE = 1e-4
HIDDEN, VOCABULARY = 64, 320

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], object]


def source_tensors(name: str = PLAIN) -> Tensors:
    return load_file(GOLDEN / name / "model.safetensors")


def source_config(name: str = PLAIN) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / name / "config.json").read_text())
    return config


def golden_vectors(name: str) -> Tensors:
    return load_file(GOLDEN / name / "golden.safetensors")


def write_checkpoint(
    directory: Path,
    *,
    name: str = PLAIN,
    config: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    edit: Edit | None = None,
    container: str = "model.safetensors",
    wrap: Callable[[Tensors], object] = lambda tensors: tensors,
) -> Path:
    """Write a golden checkpoint with changes.

    Args:
        directory: the directory to create.
        name: the golden checkpoint.
        config: keys of config.json to set.
        without: keys of config.json to leave out.
        edit: changes the tensors in place.
        container: the weight file; one that ends in ``.bin`` is written by ``torch.save``.
        wrap: makes what is saved in a ``.bin`` from the tensors.

    """
    directory.mkdir(parents=True)
    merged = {k: v for k, v in source_config(name).items() if k not in without} | dict(config or {})
    (directory / "config.json").write_text(json.dumps(merged))
    tensors = source_tensors(name)
    if edit:
        edit(tensors)
    if container.endswith(".bin"):
        torch.save(wrap(tensors), directory / container)
    else:
        save_file(tensors, directory / container)
    return directory


def write_shards(directory: Path, shards: Mapping[str, Tensors]) -> None:
    """Write tensors spread over files, and the index that says which is where."""
    for filename, tensors in shards.items():
        save_file(tensors, directory / filename)
    weight_map = {name: filename for filename, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def tiny_llama(
    head: Tensor | None = None, embedding: Tensor | None = None, **config: Any
) -> LlamaForCausalLM:
    """A verifier: transformers' own Llama, with a given head and embedding."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | config)))
    with torch.no_grad():
        if embedding is not None:
            model.model.embed_tokens.weight.copy_(embedding)
        if head is not None:
            model.lm_head.weight.copy_(head)
    return model


def save_quietly(model: Any, directory: Path) -> Path:
    """Save a model or config with ``save_pretrained``, without its output."""
    model.save_pretrained(directory)
    return directory


def stored_tensors(directory: Path) -> Tensors:
    """The tensors of a directory's model.safetensors, read by the safetensors library."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def entries(directory: Path) -> list[str]:
    """Everything below a directory, including hidden files."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return (found.float() - expected.float()).abs().max().item()


@dataclass(frozen=True)
class Run:
    """The result of a run of the command line."""

    status: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[str]:
        """The log's lines, without time and level."""
        return [line.split(" | ", 2)[2] for line in self.stderr.splitlines() if " | " in line]

    @property
    def errors(self) -> list[str]:
        """The messages of level ERROR."""
        return [
            line.split(" | ", 2)[2]
            for line in self.stderr.splitlines()
            if line.split(" | ")[1:2] == ["ERROR   "]
        ]


CommandLine = Callable[..., Run]


def run_process(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Run:
    """Run `speculators` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from speculators.__main__ import run; run()", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def fork_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of a batch from this one, so that they need not import torch again."""
    contexts = vars(multiprocessing.context)["_concrete_contexts"]
    monkeypatch.setitem(contexts, "spawn", contexts["fork"])
