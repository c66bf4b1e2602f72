"""Kinds of checkpoints that are recognised, but belong to no family: refused, each with advice."""

from speculators.families.signature import Signature

__all__ = ["CONVERTED", "LANGUAGE_MODEL", "MEDUSA", "MLP_SPECULATOR", "SEVERAL_LAYERS"]

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
