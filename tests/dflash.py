"""Golden DFlash drafts and their verifier, with changes, in the layouts of several publishers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators.convert.conversion import convert

GOLDEN_FAMILIES = Path(__file__).parent / "golden-families"
PLAIN, SELECTING = "dflash_e2e", "dflash2"
TARGET = GOLDEN_FAMILIES / PLAIN / "verifier"
"""The verifier of all of them: 8 layers, hidden size 64, a vocabulary of 320."""

HIDDEN, VOCABULARY, RANK, LAYERS = 64, 320, 8, 3
DRAFTED = 40

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], object]
Config = dict[str, Any]


def config_of(name: str = PLAIN) -> Config:
    config: Config = json.loads((GOLDEN_FAMILIES / name / "config.json").read_text())
    return config


def tensors_of(name: str = PLAIN) -> Tensors:
    return load_file(GOLDEN_FAMILIES / name / "model.safetensors")


def weights(*shape: int) -> Tensor:
    """Random weights, the same ones every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) / 4


def write_draft(
    directory: Path,
    config: Config,
    edit: Edit = lambda tensors: None,
    name: str = PLAIN,
) -> Path:
    """Write a golden draft with another config, and with changes of its tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(name)
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def native(name: str = PLAIN, /, *, nested: Mapping[str, Any] = {}, **keys: Any) -> Config:
    """z-lab's layout, with other keys; ``None`` takes one away."""
    config = config_of(name) | keys
    config["dflash_config"] = config["dflash_config"] | dict(nested)
    for keys_of in (config, config["dflash_config"]):
        for key in [key for key, value in keys_of.items() if value is None]:
            del keys_of[key]
    return config


def deepspec(**keys: Any) -> Config:
    """DeepSpec's layout: flat, with an architecture of its own."""
    config = native() | {
        "architectures": ["Qwen3DSparkModel"],
        "target_layer_ids": [1, 3, 5],
        "mask_token_id": 319,
        "num_anchors": 512,
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    del config["dflash_config"]
    return {key: it for key, it in (config | keys).items() if it is not None}


def upstream(kind: str = "dflash", /, *, layer: Mapping[str, Any] = {}, **keys: Any) -> Config:
    """What the converter of the PyPI project speculators 0.9.0 writes."""
    flat = native()
    of_layer = {
        key: value
        for key, value in flat.items()
        if key not in {"architectures", "auto_map", "block_size", "dflash_config"}
    }
    config = {
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "dtype": "float32",
        "transformer_layer_config": of_layer | dict(layer),
        "draft_vocab_size": VOCABULARY,
        "block_size": 8,
        "aux_hidden_state_layer_ids": [2, 4, 6],
        "mask_token_id": 319,
        "target_hidden_size": None,
        "sliding_window_non_causal": False,
        "sample_from_anchor": kind == "dspark",
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 7 + (kind == "dspark")}
            ],
            "verifier": {"name_or_path": str(TARGET), "architectures": ["Qwen3ForCausalLM"]},
        },
    }
    if kind == "dspark":
        config |= {
            "markov_rank": RANK,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
    return config | keys


def with_markov(
    kind: str = "vanilla", *, confidence: bool = True, drafted: int = VOCABULARY
) -> Edit:
    """Adds DSpark's heads."""

    def edit(tensors: Tensors) -> None:
        tensors["markov_head.markov_w1.weight"] = weights(VOCABULARY, RANK)
        tensors["markov_head.markov_w2.weight"] = weights(drafted, RANK)
        if kind == "gated":
            tensors["markov_head.gate_proj.weight"] = weights(RANK, HIDDEN + RANK)
            tensors["markov_head.gate_proj.bias"] = weights(RANK)
        if kind == "rnn":
            tensors["markov_head.joint_proj.weight"] = weights(3 * RANK, HIDDEN + 2 * RANK)
            tensors["markov_head.joint_proj.bias"] = weights(3 * RANK)
        if confidence:
            tensors["confidence_head.proj.weight"] = weights(1, HIDDEN + RANK)
            tensors["confidence_head.proj.bias"] = weights(1)

    return edit


def with_own_matrices(tensors: Tensors) -> None:
    """Adds an embedding and a head of full size."""
    tensors["embed_tokens.weight"] = weights(VOCABULARY, HIDDEN)
    tensors["lm_head.weight"] = weights(VOCABULARY, HIDDEN) * 2


def with_vocabulary(tensors: Tensors) -> None:
    """Adds a head of some tokens, and which they are."""
    tokens = torch.arange(0, VOCABULARY, VOCABULARY // DRAFTED)
    tensors["lm_head.weight"] = weights(DRAFTED, HIDDEN)
    tensors["d2t"] = tokens - torch.arange(DRAFTED)
    tensors["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool)
    tensors["t2d"][tokens] = True


def with_biases(tensors: Tensors) -> None:
    """Adds biases on q, k, v and o."""
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "o"):
            module = f"layers.{layer}.self_attn.{name}_proj"
            tensors[f"{module}.bias"] = weights(tensors[f"{module}.weight"].shape[0])


def both(*edits: Edit) -> Edit:
    """All of these changes."""

    def edit(tensors: Tensors) -> None:
        for one in edits:
            one(tensors)

    return edit


def converted(source: Path, output: Path, verifier: Path = TARGET, **options: Any) -> Path:
    """A draft converted by whatever family it belongs to, without validation."""
    return convert(source, output, verifier, options=options, validate=False)


def sliding(*slides: bool) -> list[str]:
    """The types of layers by whether they slide."""
    return ["sliding_attention" if it else "full_attention" for it in slides]
