"""Tiny verifiers of several architectures, and drafts that often predict them correctly."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from speculators.models.eagle import EagleSpeculator, EagleSpeculatorConfig

VERIFIERS: dict[str, tuple[type[PreTrainedModel], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 9}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_verifier(name: str = "llama", *, context: float = 0.02, **config: Any) -> PreTrainedModel:
    """A random verifier.

    Args:
        name: a key of ``VERIFIERS``.
        context: how much its layers add to the embedding of the last token. With 0 they add
            nothing, so the next token depends only on the last one.
        **config: further keys of its config.

    """
    model_class, config_class, more = VERIFIERS[name]
    torch.manual_seed(1)
    settings = {**SIZES, "num_hidden_layers": 2, "initializer_range": 0.5, **more, **config}
    model: PreTrainedModel = model_class(config_class(**settings)).eval()
    with torch.no_grad():
        _scale_outputs(model, context)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_draft(verifier: PreTrainedModel, *, layernorms: bool = False) -> EagleSpeculator:
    torch.manual_seed(2)
    vocabulary = verifier.config.get_text_config().vocab_size
    layer = {"model_type": "llama", "initializer_range": 0.3, **SIZES, "vocab_size": vocabulary}
    config = EagleSpeculatorConfig(transformer_layer_config=layer, layernorms=layernorms)
    draft = EagleSpeculator(config)
    draft.attach_verifier(verifier)
    draft.train(False)
    return draft


def knowing_draft(verifier: PreTrainedModel, doubt: float = 0.02) -> EagleSpeculator:
    """A draft that passes on the embedding, like a verifier whose layers add little.

    Args:
        verifier: a tiny verifier.
        doubt: the scale of what its randomly initialised layer adds.

    """
    draft = random_draft(verifier)
    embedding = verifier.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    assert draft.embed_tokens is not None
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(embedding)
        draft.fc.weight *= doubt
        draft.fc.weight[:, : embedding.shape[1]] += torch.eye(embedding.shape[1])
        _scale_outputs(draft.layers, doubt)
    return draft


def _scale_outputs(module: nn.Module, factor: float) -> None:
    """Scale what the layers add to their inputs."""
    for name, parameter in module.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.mul_(factor)


def prompt(length: int, seed: int = 3, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (rows, length), generator=generator)
