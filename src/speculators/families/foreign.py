"""Kinds of checkpoints that are recognised, but belong to no family: refused, each with advice."""

from speculators.families.signature import Serving, Signature, vllm

__all__ = [
    "COHERE",
    "CONVERTED",
    "DEEPSEEK",
    "DRAFT_IN_MODEL",
    "EAGLE3_EH_PROJ",
    "EAGLE3_HEADS",
    "EAGLE3_MLA",
    "GEMMA_ASSISTANT",
    "GRIFFIN",
    "GROUPED_HEADS",
    "HYDRA",
    "LANGUAGE_MODEL",
    "LLAMA4",
    "MEDUSA_IN_MODEL",
    "MINICPM",
    "MISTRAL",
    "MLP_SPECULATOR",
    "ONE_MATRIX",
    "PARD",
    "QK_NORMS",
    "SEVERAL_LAYERS",
    "UNO",
    "WITH_NORMS",
]

CONVERTED = Signature(
    "speculators",
    "a draft in the speculators format",
    hints={"speculators_model_type": r"(?!(mtp|xpress)$).+"},
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
    advice="give a draft in its place, and the language model as the verifier (BASE_MODEL)",
)

FURTHER_NORMS = {
    r"(.*\.)?(norm|layers\.0\.input_layernorm)\.weight": "a norm before its layers or after them"
}
"""What no engine's EAGLE-1 model of Llama's layers has."""

SEVERAL_LAYERS = Signature(
    "several-layers",
    "a draft of several layers",
    marks=r"layers\.[1-9]\d*\..*",
    advice="the drafts of this shape that are converted have one layer",
    serving=(
        vllm("eagle", lacks={r"(.*\.)?fc\.bias": "a bias on fc", **FURTHER_NORMS}),
        Serving("SGLang", "EAGLE", lacks=FURTHER_NORMS),
    ),
)

MEDUSA_IN_MODEL = Signature(
    "medusa-in-model",
    "a language model with Medusa heads that were trained together (Medusa-2)",
    marks=r"(.*\.)?medusa_heads?\..*",
    needs=(r"(.*\.)?layers\.\d+\.(self_attn|input_layernorm)\..*",),
    advice=(
        "the heads belong to this model, not to the one that it was made of, so they are not "
        "converted; serve the model without them, or train a draft for it"
    ),
    serving=(),
)

EAGLE3_MLA = Signature(
    "eagle3-mla",
    "an EAGLE-3 draft with latent attention (MLA)",
    marks=r"(midlayer|layers\.\d+)\.self_attn\.(q_a_proj|kv_a_proj_with_mqa|kv_b_proj)\..*",
    needs=(r"(midlayer|layers\.0)\.hidden_norm\.weight",),
    parts=("fc.weight", "midlayer.hidden_norm.weight", "midlayer.self_attn.kv_b_proj.weight"),
    advice=(
        "its attention, DeepSeek's and Kimi's, is not that of the format's layers, so it is "
        "not converted; it is served as published"
    ),
    serving=(
        vllm("eagle3"),
        Serving("SGLang", "EAGLE3"),
        Serving("TensorRT-LLM", "Eagle3"),
    ),
)

EAGLE3_EH_PROJ = Signature(
    "eagle3-eh-proj",
    "an EAGLE-3 draft with an eh_proj before its attention",
    marks=r"(midlayer|layers\.0)\.(eh_proj|enorm)\..*|(eh_proj|enorm)\..*",
    needs=(r"(midlayer|layers\.0)\.hidden_norm\.weight",),
    advice=(
        "it computes something different from other EAGLE-3 drafts, so it is not converted; "
        "TensorRT-LLM, whose variant it is, serves it as published"
    ),
    serving=(Serving("TensorRT-LLM", "Eagle3"),),
)

EAGLE3_HEADS = Signature(
    "eagle3-parallel-heads",
    "an EAGLE-3 draft with ModelOpt's parallel draft heads",
    marks=r"parallel_draft_heads\..*",
    advice="no engine computes these heads, so it is not converted",
    serving=(),
)

HYDRA = Signature(
    "hydra",
    "Hydra heads",
    marks=r"(.*\.)?hydra_(head|mlp|lm_head)\..*",
    hints={"hydra_num_heads": r"\d+"},
    parts=("hydra_mlp.0.0.linear.weight", "hydra_lm_head.0.weight"),
    advice="no engine serves them, so they are not converted",
    serving=(),
)

PARD = Signature(
    "pard",
    "a PARD draft: a small language model that drafts in parallel",
    marks=LANGUAGE_MODEL.marks,
    never=r"mask_hidden|fc\.weight|midlayer\..*",
    hints={"pard_token": r"\d+"},
    hinted=True,
    advice="it takes nothing from its verifier and needs no conversion: serve it as published",
    serving=(
        vllm("draft_model", parallel_drafting=True),
        Serving("TensorRT-LLM", "PARD"),
    ),
)

GEMMA_ASSISTANT = Signature(
    "gemma-assistant",
    "a Gemma 4 assistant",
    marks=r"pre_projection\.weight",
    needs=(r"post_projection\.weight",),
    hints={"model_type": r"gemma4_assistant"},
    parts=("pre_projection.weight", "post_projection.weight"),
    advice=(
        "it reads its verifier's cache and has no keys and values of its own; it is served as "
        "published, and is not converted"
    ),
    serving=(vllm("mtp"), Serving("SGLang", "FROZEN_KV_MTP")),
)

MLP_SPECULATOR = Signature(
    "mlp-speculator",
    "an MLP speculator",
    marks=r"(speculator\.)?(emb|proj|head|ln)\.\d+\..*",
    hints={"model_type": r"mlp_speculator"},
    parts=("emb.0.weight", "proj.0.weight", "ln.0.weight", "head.0.weight"),
    advice=(
        "no current engine serves it (vLLM removed it in 0.33.0, and 0.32 has no setting for it), "
        "so it is not converted"
    ),
    serving=(),
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
    "one matrix, not a draft; it may be the verifier's head",
    marks=r"weight",
    alone=True,
    advice="give the file that holds the draft's tensors",
)

UNO = Signature(
    "uno",
    "a LoRA adapter, as UNO's drafts are",
    marks=r".*\.lora_[AB]\..*",
    alone=True,
    advice=(
        "UNO drafts with the verifier itself and this adapter, so there is nothing to convert; "
        "any other adapter is not a draft"
    ),
    serving=(Serving("SGLang", "UNO", note="with --uno-lora-path, if it was trained as a draft"),),
)

GRIFFIN = Signature(
    "griffin",
    "a GRIFFIN draft",
    marks=r"fc\.fc\.(weight|bias)|fc\.mlp\..*",
    advice="its token-guided fusion is not a part of EAGLE, so it is not converted",
    serving=(),
)

MINICPM = Signature(
    "minicpm-eagle",
    "an EAGLE draft of MiniCPM",
    marks=r"eagle_layers\.\d+\..*|input_norm[12]\.weight",
    advice=(
        "MiniCPM's draft has norms of its own and scales its embedding and residuals: it is a "
        "different architecture, so it is not converted; vLLM serves it as published"
    ),
    serving=(vllm("eagle"),),
)

MISTRAL = Signature(
    "mistral-eagle",
    "an EAGLE draft in Mistral's own names",
    marks=r"eagle_linear\..*",
    advice="it is a different architecture, so it is not converted; it is served as published",
    serving=(vllm("eagle"), Serving("SGLang", "EAGLE")),
)

COHERE = Signature(
    "cohere-eagle",
    "an EAGLE draft of Cohere's Command",
    marks=r"norm\.weight",
    needs=(r"fc\.bias", r"layers\.0\.input_layernorm\.weight"),
    # Its attention and its MLP take the same norm's output.
    never=r"layers\.\d+\.post_attention_layernorm\..*|.*hidden_norm\..*",
    fc_inputs=2,
    both=True,
    hints={"architectures": r"(Eagle)?Cohere.*"},
    advice=(
        "Cohere's layer, which computes attention and MLP in parallel, and the norm after it make "
        "it a different architecture, so it is not converted; vLLM serves it as published, if its "
        "config.json says architectures CohereForCausalLM or EagleCohereForCausalLM"
    ),
    serving=(vllm("eagle"),),
)

DEEPSEEK = Signature(
    "deepseek-eagle",
    "an EAGLE draft of DeepSeek",
    marks=r"enorm\.weight",
    needs=(r"hnorm\.weight", r"norm\.weight"),
    never=r".*eh_proj\..*",
    fc_inputs=2,
    both=True,
    hints={"architectures": r"EagleDeepSeek.*"},
    advice=(
        "its latent attention and its norms on embedding and state (enorm, hnorm) make it a "
        "different architecture, so it is not converted; vLLM serves it as published, if its "
        "config.json says architectures EagleDeepSeekMTPModel"
    ),
    serving=(vllm("eagle"),),
)

LLAMA4 = Signature(
    "llama4-eagle",
    "an EAGLE draft with a Llama-4 layer",
    marks=r"layers\.0\.feed_forward\..*",
    fc_inputs=2,
    both=True,
    advice=(
        "Llama 4's layer differs from Llama's, so it is not converted; vLLM serves "
        "such drafts as published"
    ),
    serving=(vllm("eagle"),),
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
    serving=(),
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
    serving=(),
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
    serving=(),
)
