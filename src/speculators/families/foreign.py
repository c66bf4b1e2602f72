"""Kinds of checkpoints that are recognised, but belong to no family: refused, each with advice."""

from speculators.families.signature import Signature

__all__ = [
    "CONVERTED",
    "DRAFT_IN_MODEL",
    "GRIFFIN",
    "GROUPED_HEADS",
    "LANGUAGE_MODEL",
    "LLAMA4",
    "MEDUSA",
    "MINICPM",
    "MISTRAL",
    "MLP_SPECULATOR",
    "ONE_MATRIX",
    "QK_NORMS",
    "SEVERAL_LAYERS",
    "WITH_NORMS",
]

CONVERTED = Signature(
    "speculators",
    "a draft in the speculators format",
    hints={"speculators_model_type": r".+"},
    decisive=True,
    advice="it is converted already: load it with speculators.models.load_draft",
)

LANGUAGE_MODEL = Signature(
    "language-model",
    "a whole language model",
    marks=(
        r"layers\.0\.input_layernorm\.weight|layers\.[1-9]\d*\..*|(transformer\.)?h\.\d+\..*"
        r"|(language_model\.(model\.)?|decoder\.|backbone\.|gpt_neox\.)layers\.\d+\..*"
    ),
    lacks="fc.weight",
    hints={"architectures": r".*ForCausalLM", "num_hidden_layers": r"[2-9]|\d\d+"},
    parts=("embed_tokens.weight", "layers.0.input_layernorm.weight", "norm.weight"),
    advice="give the draft as INPUT, and the language model as BASE_MODEL",
)

SEVERAL_LAYERS = Signature(
    "several-layers",
    "a draft of several layers",
    marks=r"layers\.[1-9]\d*\..*",
    advice="the drafts of this shape that are converted have one layer",
)

MEDUSA = Signature(
    "medusa",
    "Medusa heads",
    marks=(
        r"(medusa_head\.)?\d+\.\d+\.(linear\.)?(weight|bias)"
        r"|blocks\.\d+\.layers\.\d+\.(weight|bias)"
    ),
    hints={"medusa_num_heads": r"\d+"},
    parts=("0.0.linear.weight", "0.0.linear.bias", "0.1.weight"),
    advice="they are not converted",
)

MLP_SPECULATOR = Signature(
    "mlp-speculator",
    "an MLP speculator",
    marks=r"(speculator\.)?(emb|proj|head|ln)\.\d+\..*",
    hints={"model_type": r"mlp_speculator"},
    parts=("emb.0.weight", "proj.0.weight", "ln.0.weight", "head.0.weight"),
    advice="it is not converted",
)

DRAFT_IN_MODEL = Signature(
    "draft-in-model",
    "a draft inside the file of a whole model",
    advice=(
        "save the draft's tensors alone, without the part of their names that they share, beside "
        "a config.json of the draft"
    ),
)
"""Shown by a family's tensors below one prefix, and others: see ``recognition``."""

ONE_MATRIX = Signature(
    "matrix",
    "one matrix and no draft; it may be the verifier's head",
    marks=r"weight",
    alone=True,
    advice="give the file that holds the draft's tensors",
)

GRIFFIN = Signature(
    "griffin",
    "a GRIFFIN draft",
    marks=r"fc\.fc\.(weight|bias)|fc\.mlp\..*",
    advice="its token-guided fusion is another architecture than EAGLE's, and is not converted",
)

MINICPM = Signature(
    "minicpm-eagle",
    "an EAGLE draft of MiniCPM",
    marks=r"eagle_layers\.\d+\..*|input_norm[12]\.weight",
    advice=(
        "MiniCPM's draft has norms of its own and scales its embedding and residuals: it is "
        "another architecture, and is not converted; vLLM serves it as published"
    ),
)

MISTRAL = Signature(
    "mistral-eagle",
    "an EAGLE draft in Mistral's own names",
    marks=r"eagle_linear\..*",
    advice="it is another architecture, and is not converted; vLLM serves it as published",
)

LLAMA4 = Signature(
    "llama4-eagle",
    "an EAGLE draft with a Llama-4 layer",
    marks=r"layers\.0\.feed_forward\..*",
    fc_inputs=2,
    both=True,
    advice=(
        "Llama 4's layer is another architecture than Llama's, and is not converted; vLLM serves "
        "such drafts as published"
    ),
)

QK_NORMS = Signature(
    "eagle-qk-norms",
    "an EAGLE-1 draft with norms on queries and keys",
    marks=r"layers\.0\.self_attn\.[qk]_norm\.weight",
    fc_inputs=2,
    both=True,
    lacks="hidden_norm.weight",
    advice=(
        "Qwen3's attention has these norms, and the format's layers (Llama's and Qwen2's) do not, "
        "so it is not converted"
    ),
)

WITH_NORMS = Signature(
    "eagle-with-norms",
    "an EAGLE-1 draft with a norm before its layer or after it",
    marks=r"layers\.0\.input_layernorm\.weight|norm\.weight",
    fc_inputs=2,
    both=True,
    lacks="hidden_norm.weight",
    advice=(
        "NeMo Automodel and verl-SpeCo train such drafts; the format has no place for these "
        "norms, and without them the draft would compute something else, so it is not converted"
    ),
)

GROUPED_HEADS = Signature(
    "eagle-grouped-heads",
    "an EAGLE-1 draft with queries, keys and values in one matrix",
    marks=r"layers\.0\..*\.(wqkv|query_key_value|c_attn)\.(weight|bias)",
    fc_inputs=2,
    both=True,
    advice=(
        "how its rows are ordered differs from model to model, so save q_proj, k_proj and v_proj "
        "as matrices of their own"
    ),
)
