"""The classes of transformers that the layers of drafts are built from."""

from dataclasses import dataclass

from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

__all__ = ["LAYER_CLASSES", "LayerClasses"]


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
