"""MTP heads outside a language model, by whose they are: recognised, and never converted.

A language model with its MTP inside is a language model.
"""

from speculators.families.mtp_in_gguf import why_not_in_gguf
from speculators.families.signature import Serving, Signature, vllm

__all__ = ["MTP", "MTP_OF_UPSTREAM"]

BODY = r"(?!mtp\.)(.*\.)?(layers|h|blocks)\.\d+\..*"
"""The layers of a language model."""

FORMAT = (
    "no engine reads it in the speculators format, so it stays in its native layout: "
    "`speculators mtp graft` puts it into its verifier's checkpoint, `speculators mtp cut` takes "
    "it out, and `speculators evaluate` measures it (those other than Qwen's with --server)"
)

VLLM = vllm("mtp")
SGLANG = Serving("SGLang", "NEXTN")
LLAMA_CPP = Serving(
    "llama.cpp",
    "draft-mtp",
    note="cut out of its verifier with `mtp cut --to llamacpp`",
    refuses=why_not_in_gguf,
)
TENSORRT = Serving(
    "TensorRT-LLM", "MTP", note="in the verifier's directory, if it knows the verifier"
)
BOTH = (VLLM, SGLANG)

MTP_OF_UPSTREAM = Signature(
    "speculators-mtp",
    "an MTP head in upstream's speculators type mtp",
    hints={"speculators_model_type": r"mtp"},
    decisive=True,
    advice=(
        "no engine reads this type, and its head is all NaN: cut the MTP out of its verifier's "
        "checkpoint, with `speculators mtp cut`"
    ),
    serving=(),
)

MTP = (
    Signature(
        "mtp-qwen",
        "an MTP head of the Qwen type",
        marks=r"mtp\.(fc|pre_fc_norm_(embedding|hidden))\.weight",
        never=BODY,
        parts=("mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.norm.weight"),
        advice=FORMAT,
        serving=(*BOTH, LLAMA_CPP, TENSORRT),
    ),
    Signature(
        "mtp-longcat",
        "an MTP head of LongCat",
        marks=r"mtp\.layers\.\d+\.((enorm|hnorm)\.m|transformer_layer)\..*",
        never=BODY,
        advice=FORMAT,
        serving=BOTH,
    ),
    Signature(
        "mtp-mimo-v2",
        "an MTP head of MiMo-V2",
        marks=r"mtp\.layers\.\d+\.pre_mlp_layernorm\.weight",
        needs=(r"mtp\.layers\.\d+\.eh_proj\.weight",),
        never=BODY,
        advice=FORMAT,
        serving=(vllm("mtp", "the first of several layers only"), SGLANG, LLAMA_CPP),
    ),
    Signature(
        "mtp-nemotron-h",
        "an MTP head of Nemotron-H",
        marks=r"mtp\.layers\.\d+\.(eh_proj|enorm|hnorm|mixer)\..*",
        never=BODY,
        advice=FORMAT,
        serving=(*BOTH, LLAMA_CPP, TENSORRT),
    ),
    Signature(
        "mtp-mimo",
        "an MTP head of MiMo, whose input_proj takes the hidden state before the embedding",
        marks=r"mtp_layers\.\d+\.(input_proj|token_layernorm|hidden_layernorm)\.weight",
        never=r"(?!mtp_layers\.)(.*\.)?layers\.\d+\..*",
        parts=("mtp_layers.0.input_proj.weight", "mtp_layers.0.token_layernorm.weight"),
        advice=FORMAT,
        serving=(VLLM, Serving("SGLang", "NEXTN", note="the first of several layers only")),
    ),
    Signature(
        "mtp-ernie",
        "an MTP head of Ernie 4.5",
        marks=r"mtp_(emb_norm|hidden_norm|linear_proj|block)\.\d+\..*",
        never=BODY,
        parts=("mtp_emb_norm.0.weight", "mtp_linear_proj.0.weight"),
        advice=FORMAT,
        serving=BOTH,
    ),
    Signature(
        "mtp-deepseek",
        "an MTP head of the DeepSeek type",
        marks=(
            r"(language_model\.(model\.)?)?layers\.[1-9]\d*"
            r"\.(eh_proj|enorm|hnorm|shared_head\.norm)\.weight"
        ),
        never=r"(.*\.)?layers\.0\..*|fc\.weight|midlayer\..*",
        parts=("layers.61.eh_proj.weight", "layers.61.enorm.weight", "layers.61.hnorm.weight"),
        advice=FORMAT,
        serving=(*BOTH, LLAMA_CPP, TENSORRT),
    ),
    Signature(
        "mtp-deepseek-layer-0",
        "an MTP head of the DeepSeek type, numbered from 0 as SGLang exports it",
        marks=r"layers\.0\.eh_proj\.weight",
        needs=(r"layers\.0\.enorm\.weight",),
        never=r"(.*\.)?layers\.[1-9]\d*\..*|fc\.weight|midlayer\..*|d2t|t2d",
        advice=FORMAT,
        serving=(SGLANG,),
    ),
    Signature(
        "mtp-iquest-q1",
        "an MTP head of IQuest Q1, a checkpoint of its own",
        marks=r"target_final_norm\.weight",
        needs=(r"mtp\..*",),
        advice=(
            "it belongs beside its verifier's checkpoint, as it was published, and is not converted"
        ),
        serving=(SGLANG,),
    ),
    Signature(
        "mtp",
        "an MTP head of a layout of its own",
        marks=r"mtp[._].*",
        never=BODY,
        advice=FORMAT,
        serving=(
            vllm("mtp", "if it knows the verifier"),
            Serving("SGLang", "NEXTN", note="likewise"),
            LLAMA_CPP,
        ),
    ),
)
"""In the order in which a checkpoint is judged."""
