"""The tensors of an EAGLE-3 draft, and what they are called."""

from speculators.format.tensors import TensorSpec

__all__ = ["FEATURES", "OLDER_PREFIXES", "OMISSIONS", "TENSORS"]

FEATURES = {
    "embedding": "an embedding of its own",
    "draft_vocabulary": "a vocabulary of its own",
    "fc_bias": "a bias on fc",
    "fc_norm": "a norm on each of the verifier's states",
    "input_norm": "a norm on all of the verifier's states together",
    "attention_bias": "biases on q, k, v and o",
    "mlp_bias": "biases in the MLP",
    "qk_norm": "norms on queries and keys",
    "mask_hidden": "a hidden state for tokens that are not drafted yet",
}

TENSORS = (
    TensorSpec("embed_tokens.weight", ("vocabulary", "hidden"), "embedding"),
    TensorSpec("fc.weight", ("hidden", "states")),
    TensorSpec("fc.bias", ("hidden",), "fc_bias"),
    TensorSpec("fc_norm.{state}.weight", ("state",), "fc_norm"),
    TensorSpec("input_norm.weight", ("states",), "input_norm"),
    TensorSpec("mask_hidden", ("one", "one", "states"), "mask_hidden"),
    TensorSpec("layers.0.hidden_norm.weight", ("hidden",)),
    TensorSpec("layers.{layer}.input_layernorm.weight", ("hidden",)),
    TensorSpec("layers.0.self_attn.q_proj.weight", ("queries", "embedding+hidden")),
    TensorSpec("layers.0.self_attn.k_proj.weight", ("keys", "embedding+hidden")),
    TensorSpec("layers.0.self_attn.v_proj.weight", ("keys", "embedding+hidden")),
    TensorSpec("layers.{layer}.self_attn.q_proj.weight", ("queries", "hidden"), first=1),
    TensorSpec("layers.{layer}.self_attn.k_proj.weight", ("keys", "hidden"), first=1),
    TensorSpec("layers.{layer}.self_attn.v_proj.weight", ("keys", "hidden"), first=1),
    TensorSpec("layers.{layer}.self_attn.o_proj.weight", ("hidden", "queries")),
    TensorSpec("layers.{layer}.self_attn.q_proj.bias", ("queries",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.k_proj.bias", ("keys",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.v_proj.bias", ("keys",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.o_proj.bias", ("hidden",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.q_norm.weight", ("head",), "qk_norm"),
    TensorSpec("layers.{layer}.self_attn.k_norm.weight", ("head",), "qk_norm"),
    TensorSpec("layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
    TensorSpec("layers.{layer}.mlp.gate_proj.weight", ("intermediate", "hidden")),
    TensorSpec("layers.{layer}.mlp.up_proj.weight", ("intermediate", "hidden")),
    TensorSpec("layers.{layer}.mlp.down_proj.weight", ("hidden", "intermediate")),
    TensorSpec("layers.{layer}.mlp.gate_proj.bias", ("intermediate",), "mlp_bias"),
    TensorSpec("layers.{layer}.mlp.up_proj.bias", ("intermediate",), "mlp_bias"),
    TensorSpec("layers.{layer}.mlp.down_proj.bias", ("hidden",), "mlp_bias"),
    TensorSpec("norm.weight", ("hidden",)),
    TensorSpec("lm_head.weight", ("drafted", "hidden")),
    TensorSpec("d2t", ("drafted",), "draft_vocabulary", dtypes=("I64",)),
    TensorSpec("t2d", ("vocabulary",), "draft_vocabulary", dtypes=("BOOL",)),
)
"""``d2t`` holds offsets: token i of the draft is token i + d2t[i] of the verifier. ``t2d`` is true
for the verifier's tokens that the draft has."""

OLDER_PREFIXES = {
    "midlayer.": "layers.0.",
    # SGLang's first names for the norms of EAGLE-3.1.
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
"""Prefix in research checkpoints → prefix in the format."""

OMISSIONS = {
    r"(layers\.\d+|midlayer)\.self_attn\.rotary_emb\.inv_freq": "it is computed from the config",
}
