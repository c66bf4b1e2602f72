"""The tensors of a converted EAGLE checkpoint: names, shapes, and the features they belong to."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

__all__ = ["DTYPES", "FEATURES", "TENSORS", "TensorSpec", "features_of", "required_tensors"]

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that a draft may have: safetensors' name → torch's name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the format.

    Attributes:
        name: its name in model.safetensors.
        dimensions: its shape, as keys of ``LayerConfig.dimensions()``.
        feature: the feature that it belongs to, or ``None`` if every draft has it.

    """

    name: str
    dimensions: tuple[str, ...]
    feature: str | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for the given sizes."""
        return tuple(sizes[dimension] for dimension in self.dimensions)


FEATURES = {
    "embedding": "an embedding of its own",
    "fusion_bias": "a bias on fc",
    "attention_bias": "biases on q, k and v",
    "layernorms": "extra layernorms",
}
"""Optional feature of a draft → what messages call it."""

TENSORS = (
    TensorSpec("embed_tokens.weight", ("vocabulary", "hidden"), "embedding"),
    TensorSpec("fc.weight", ("hidden", "embedding+hidden")),
    TensorSpec("fc.bias", ("hidden",), "fusion_bias"),
    TensorSpec("layers.0.self_attn.q_proj.weight", ("queries", "hidden")),
    TensorSpec("layers.0.self_attn.k_proj.weight", ("keys", "hidden")),
    TensorSpec("layers.0.self_attn.v_proj.weight", ("keys", "hidden")),
    TensorSpec("layers.0.self_attn.o_proj.weight", ("hidden", "queries")),
    TensorSpec("layers.0.self_attn.q_proj.bias", ("queries",), "attention_bias"),
    TensorSpec("layers.0.self_attn.k_proj.bias", ("keys",), "attention_bias"),
    TensorSpec("layers.0.self_attn.v_proj.bias", ("keys",), "attention_bias"),
    TensorSpec("layers.0.mlp.gate_proj.weight", ("intermediate", "hidden")),
    TensorSpec("layers.0.mlp.up_proj.weight", ("intermediate", "hidden")),
    TensorSpec("layers.0.mlp.down_proj.weight", ("hidden", "intermediate")),
    TensorSpec("layers.0.post_attention_layernorm.weight", ("hidden",)),
    TensorSpec("post_embedding_layernorm.weight", ("hidden",), "layernorms"),
    TensorSpec("hidden_layernorm.weight", ("hidden",), "layernorms"),
    TensorSpec("pre_lm_head_layernorm.weight", ("hidden",), "layernorms"),
)


def features_of(names: Collection[str]) -> frozenset[str]:
    """The features that these tensor names show; one tensor of a feature is enough."""
    return frozenset(spec.feature for spec in TENSORS if spec.feature and spec.name in names)


def required_tensors(features: Collection[str]) -> dict[str, TensorSpec]:
    """The tensors, by name, that a draft with these features must have."""
    return {spec.name: spec for spec in TENSORS if spec.feature is None or spec.feature in features}
