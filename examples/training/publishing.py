"""Writing drafts as their publishers do: a config.json and a few tensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training.draft import Draft
from training.recipes import Recipe


def draft_config(verifier: Any, recipe: Recipe) -> dict[str, Any]:
    """The config.json of a draft of EAGLE's for this verifier."""
    theirs = verifier.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_attention_heads": theirs.num_attention_heads,
        "num_key_value_heads": theirs.num_key_value_heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "vocab_size": theirs.vocab_size,
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
        "pad_token_id": theirs.pad_token_id,
        "tie_word_embeddings": False,
        "use_cache": True,
    } | dict(recipe.config)


def dflash_config(
    verifier: Any, recipe: Recipe, reads: tuple[int, ...], mask_token: int
) -> dict[str, Any]:
    """The config.json of a DFlash draft for this verifier, in z-lab's layout."""
    theirs, config = verifier.config, draft_config(verifier, recipe)
    return config | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": theirs.hidden_size // theirs.num_attention_heads,
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "max_position_embeddings": theirs.max_position_embeddings,
        "rope_scaling": None,
        "rope_theta": theirs.rope_parameters["rope_theta"],
        "sliding_window": None,
        "use_sliding_window": False,
        "num_target_layers": theirs.num_hidden_layers,
        # A layer's number is that of the state that leaves it, not of the one that enters it.
        "dflash_config": {
            "mask_token_id": mask_token,
            "target_layer_ids": [layer - 1 for layer in reads],
        },
    }


def publish(directory: Path, draft: Draft, recipe: Recipe) -> None:
    """Write a draft; its weights are there as a whole, or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    published = draft.config | {"torch_dtype": str(recipe.dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    tensors = {
        name: (tensor.to(recipe.dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in draft.tensors().items()
    }
    unfinished = directory / f"{recipe.file}.part"
    if recipe.file.endswith(".bin"):
        torch.save(tensors, unfinished)
    else:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(directory / recipe.file)
