"""The tensors of DFlash, DFlash 2 and DSpark drafts: the same names in all layouts."""

from speculators.format.tensors import TensorSpec

__all__ = [
    "DFLASH2_FEATURES",
    "DFLASH2_TENSORS",
    "DFLASH_FEATURES",
    "DFLASH_TENSORS",
    "DSPARK_FEATURES",
    "DSPARK_TENSORS",
    "OLDER_PREFIXES",
    "OMISSIONS",
]

DFLASH_FEATURES = {
    "embedding": "an embedding of its own",
    "head": "a head of its own",
    "draft_vocabulary": "a vocabulary of its own",
    "attention_bias": "biases on q, k, v and o",
}
DFLASH2_FEATURES = DFLASH_FEATURES
DSPARK_FEATURES = DFLASH_FEATURES | {
    "gated_markov": "a gated Markov head",
    "rnn_markov": "a recurrent (rnn) Markov head",
    "confidence_head": "a confidence head",
}

DFLASH_TENSORS = (
    TensorSpec("embed_tokens.weight", ("vocabulary", "hidden"), "embedding"),
    TensorSpec("fc.weight", ("hidden", "states")),
    TensorSpec("hidden_norm.weight", ("hidden",)),
    TensorSpec("layers.{layer}.input_layernorm.weight", ("hidden",)),
    TensorSpec("layers.{layer}.self_attn.q_proj.weight", ("queries", "hidden")),
    TensorSpec("layers.{layer}.self_attn.k_proj.weight", ("keys", "hidden")),
    TensorSpec("layers.{layer}.self_attn.v_proj.weight", ("keys", "hidden")),
    TensorSpec("layers.{layer}.self_attn.o_proj.weight", ("hidden", "queries")),
    TensorSpec("layers.{layer}.self_attn.q_proj.bias", ("queries",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.k_proj.bias", ("keys",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.v_proj.bias", ("keys",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.o_proj.bias", ("hidden",), "attention_bias"),
    TensorSpec("layers.{layer}.self_attn.q_norm.weight", ("head",)),
    TensorSpec("layers.{layer}.self_attn.k_norm.weight", ("head",)),
    TensorSpec("layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
    TensorSpec("layers.{layer}.mlp.gate_proj.weight", ("intermediate", "hidden")),
    TensorSpec("layers.{layer}.mlp.up_proj.weight", ("intermediate", "hidden")),
    TensorSpec("layers.{layer}.mlp.down_proj.weight", ("hidden", "intermediate")),
    TensorSpec("norm.weight", ("hidden",)),
    TensorSpec("lm_head.weight", ("drafted", "hidden"), "head"),
    TensorSpec("d2t", ("drafted",), "draft_vocabulary", dtypes=("I64",)),
    TensorSpec("t2d", ("vocabulary",), "draft_vocabulary", dtypes=("BOOL",)),
)
"""``fc`` and ``hidden_norm`` make the context of the verifier's states; every layer projects it to
keys and values with the same matrices as its own input. ``d2t`` and ``t2d`` are as EAGLE-3's."""

DFLASH2_TENSORS = (
    *DFLASH_TENSORS,
    TensorSpec("layers.{layer}.attention_conv.base_kernel", ("two", "taps", "hidden")),
    TensorSpec("layers.{layer}.attention_conv.kernel_projection.weight", ("kernels", "hidden")),
    TensorSpec("layers.{layer}.mlp_conv.base_kernel", ("two", "taps", "hidden")),
    TensorSpec("layers.{layer}.mlp_conv.kernel_projection.weight", ("kernels", "hidden")),
    TensorSpec("candidate_selector.predecessor_codebook", ("vocabulary", "rank")),
    TensorSpec("candidate_selector.successor_codebook", ("vocabulary", "rank")),
    TensorSpec("candidate_selector.hidden_projection.weight", ("rank", "hidden")),
)
"""Each convolution has two kernels: of what enters the module, and of what leaves it."""

DSPARK_TENSORS = (
    *DFLASH_TENSORS,
    TensorSpec("markov_head.markov_w1.weight", ("vocabulary", "rank")),
    TensorSpec("markov_head.markov_w2.weight", ("drafted", "rank")),
    TensorSpec("markov_head.gate_proj.weight", ("rank", "hidden+rank"), "gated_markov"),
    TensorSpec("markov_head.gate_proj.bias", ("rank",), "gated_markov"),
    TensorSpec("markov_head.joint_proj.weight", ("3rank", "hidden+2rank"), "rnn_markov"),
    TensorSpec("markov_head.joint_proj.bias", ("3rank",), "rnn_markov"),
    TensorSpec("confidence_head.proj.weight", ("one", "confidence"), "confidence_head"),
    TensorSpec("confidence_head.proj.bias", ("one",), "confidence_head"),
)

OLDER_PREFIXES = {
    # Early drafts of SpecForge.
    "logit_head.": "",
    # ModelOpt.
    "markov_w1.": "markov_head.markov_w1.",
    "markov_w2.": "markov_head.markov_w2.",
    "gate_proj.": "markov_head.gate_proj.",
    "joint_proj.": "markov_head.joint_proj.",
    "confidence_proj.": "confidence_head.proj.",
}
"""Prefix in research checkpoints → prefix in the format."""


OMISSIONS = {
    r"verifier_(lm_head|norm)\.weight": "it is the verifier's, and only trainers read it",
    r"markov_head\.markov_w[12]\.weight": "its Markov head has rank 0, and so holds nothing",
}
"""The second is for DFlash: with a Markov head that holds something, a draft is DSpark's."""
