"""The parts of transformers that drafts are built from, and what their layers take."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from speculators.models.output import CACHE

__all__ = ["LAYER_CLASSES", "LayerClasses", "causal_inputs", "frozen_linear"]


@dataclass(frozen=True, slots=True)
class LayerClasses:
    """The classes that belong to one type of layer."""

    decoder_layer: type[nn.Module]
    norm: type[nn.Module]
    rotary_embedding: type[nn.Module]


LAYER_CLASSES = {
    "llama": LayerClasses(
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaRotaryEmbedding,
    ),
    "qwen2": LayerClasses(
        modeling_qwen2.Qwen2DecoderLayer,
        modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen2.Qwen2RotaryEmbedding,
    ),
    "qwen3": LayerClasses(
        modeling_qwen3.Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
}
"""By the ``model_type`` of the layer's config."""


def causal_inputs(
    config: PretrainedConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> dict[str, Any]:
    """What a decoder layer takes besides its input, except for the rotary embeddings.

    Args:
        config: of the layers.
        x: (batch, sequence, hidden), the first layer's input.
        attention_mask: (batch, past + sequence), 1 for tokens and 0 for padding; or a 4D mask.
        position_ids: (batch, sequence); they continue from the cache if not given.
        cache: of the layers.

    Returns:
        keyword arguments: the mask, the positions, and the cache.

    """
    if position_ids is None:
        past = cache.get_seq_length() if cache is not None else 0
        position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
    cached: dict[str, Any] = {CACHE: cache}
    mask = create_causal_mask(
        config=config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **cached,
    )
    return {"attention_mask": mask, "position_ids": position_ids, **cached}


def frozen_linear(weight: Tensor) -> nn.Linear:
    """A linear layer without bias and gradients, with this weight, (outputs, inputs)."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
