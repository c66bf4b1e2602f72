"""Drafts of a block that are recognised, but belong to no family: refused, each with advice."""

from speculators.families.signature import Serving, Signature, vllm

__all__ = [
    "DFLARE",
    "DOMINO",
    "DSPARK_OF_DEEPSEEK",
    "LAGUNA",
    "LILICORR",
    "MUSE",
    "OTHER_DSPARKS",
    "XPRESS",
    "XPRESS_OF_UPSTREAM",
]

AS_PUBLISHED = "it is served as published, and is not converted"

VLLM = vllm("dflash")
SGLANG = Serving("SGLang", "DFLASH")

DSPARK_OF_DEEPSEEK = Signature(
    "dspark-deepseek",
    "a DSpark draft of DeepSeek-V4, under the names mtp.* of its verifier",
    marks=r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\..*",
    parts=("mtp.0.main_proj.weight", "mtp.2.markov_head.markov_w1.weight"),
    advice=(
        "it has three stages with hyper-connections and is not an MTP; it is served from its "
        "verifier's checkpoint as published, and is not converted"
    ),
    serving=(
        vllm("dspark", 'without "model"'),
        Serving("SGLang", "DSPARK"),
        Serving("TensorRT-LLM", "DSpark"),
    ),
)

LAGUNA = Signature(
    "dflash-laguna",
    "a Laguna DFlash draft",
    marks=r"layers\.\d+\.self_attn\.g_proj\..*|aux_hidden_norms\.\d+\..*",
    needs=(r"fc\.weight", r"hidden_norm\.weight"),
    hints={"architectures": r"DFlashLaguna.*"},
    parts=("fc.weight", "hidden_norm.weight", "layers.0.self_attn.g_proj.weight"),
    advice=(
        "its gates (g_proj) and its norms of each state (aux_hidden_norms) are not DFlash's, and "
        f"without them it would compute something else; {AS_PUBLISHED}"
    ),
    serving=(VLLM, SGLANG, Serving("TensorRT-LLM", "DFlash")),
)

DFLARE = Signature(
    "dflare",
    "a DFlare draft",
    marks=r"(.*\.)?(layer_fusion_weights.*|[kv]_proj_target\..*)",
    parts=("layer_fusion_weights", "layers.0.self_attn.k_proj_target.weight"),
    advice=(
        "it fuses the verifier's states anew for each layer, which DFlash's readers do not do, so "
        "it is not converted; AngelSlim, which trains it, runs it"
    ),
    serving=(),
)

DOMINO = Signature(
    "domino",
    "a Domino draft",
    marks=r"(logit_head\.)?(prefix_gru\..*|embed_proj\.\d+\.(weight|bias))",
    parts=("fc.weight", "prefix_gru.weight_ih_l0", "embed_proj.0.weight"),
    advice=(
        "it corrects its tokens with a GRU, and its backbone alone, which is a DFlash draft's, "
        f"would compute something else; {AS_PUBLISHED}"
    ),
    serving=(SGLANG,),
)

XPRESS = Signature(
    "xpress",
    "an XPress draft",
    marks=r"(xpress_head|refiner_head)\..*",
    hints={"architectures": r".*XPress.*"},
    parts=("fc.weight", "xpress_head.w1.weight", "xpress_head.w2.weight"),
    advice="its refiner is not DFlash's, so it is not converted",
    serving=(
        vllm(
            "dflash",
            "with the names xpress_head.*",
            lacks={r"(.*\.)?refiner_head\..*": "the names refiner_head.* of its trainer"},
        ),
    ),
)

XPRESS_OF_UPSTREAM = Signature(
    "speculators-xpress",
    "an XPress draft in upstream's speculators type xpress",
    hints={"speculators_model_type": r"xpress"},
    decisive=True,
    advice=(
        "no engine reads this type: vLLM serves the native layout, with the names xpress_head.*"
    ),
    serving=(),
)

LILICORR = Signature(
    "lilicorr",
    "a LiLiCorr draft",
    marks=r"lilicorr\..*",
    hints={"architectures": r"LiLiCorr.*"},
    parts=("fc.weight", "lilicorr.weight"),
    advice=f"its reranker is not DFlash's; {AS_PUBLISHED}",
    serving=(VLLM, SGLANG),
)

MUSE = Signature(
    "muse-assistant",
    "a Muse Glimmer assistant, a DFlash draft under other names",
    marks=r"encoder\.output_norm_enc\.weight",
    hints={"architectures": r"MuseGlimmerAssistant.*", "model_type": r"muse_glimmer_assistant"},
    parts=("encoder.fc.weight", "encoder.output_norm_enc.weight"),
    advice=AS_PUBLISHED,
    serving=(VLLM, SGLANG),
)


def _dspark(kind: str, of: str, marks: str, layer: str, *serving: Serving) -> Signature:
    """A DSpark draft whose layers are its verifier's, and not Qwen3's."""
    return Signature(
        kind,
        f"a DSpark draft of {of}",
        marks=marks,
        needs=(r"(.*\.)?(markov_head\..*|markov_w[12]\.weight)",),
        advice=f"its layers are {layer}, which the format's are not; {AS_PUBLISHED}",
        serving=serving,
    )


OTHER_DSPARKS = (
    _dspark(
        "dspark-gemma4",
        "Gemma 4",
        r"layers\.\d+\.(pre|post)_feedforward_layernorm\.weight",
        "Gemma 4's",
        vllm("dspark"),
    ),
    _dspark(
        "dspark-kimi-k3",
        "Kimi K3",
        r"context_(proj|norm)\.weight|layers\.\d+\.self_attn\.kv_a_proj_with_mqa\..*",
        "Kimi K3's, with latent attention (MLA)",
        vllm("dspark"),
    ),
    _dspark(
        "dspark-muse-spark",
        "Muse Spark",
        r"layers\.\d+\.(post_attn_norm|pre_ffn_norm|post_ffn_norm)\.weight",
        "Muse Spark's",
        vllm("dspark", "from 0.33 on"),
    ),
    _dspark(
        "dspark-minimax",
        "MiniMax",
        r"(.*\.)?layers\.\d+\.decoder_layer\..*",
        "MiniMax's",
        Serving("SGLang", "DSPARK"),
    ),
)
"""By vLLM 0.33.0 (``Gemma4DSparkModel``, ``K3DSparkModel``, ``MuseSparkDSparkModel``) and SGLang
0.5.23 (``DSparkMiniMaxDraftModel``)."""
