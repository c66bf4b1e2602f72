"""EAGLE-1, EAGLE-2, HASS, and the variant with extra layernorms.

EAGLE-2 uses EAGLE-1's weights and grows another tree; HASS trains the same module in another way
(SafeAILab/EAGLE, eagle/model/cnets1.py; HArmonizedSS/HASS). The extra layernorms come from
research/hass/model/llama_eagle_full_grad.py of speculators 0.1.0.
"""

import re
from pathlib import PurePath
from typing import Any, Literal

from speculators.errors import ConversionError
from speculators.families.advice import give_each_its_compile_cache, limit_context
from speculators.families.family import Card, Derived, Family, Flag, Names, Source
from speculators.families.research.layer import REFERENCE_ROPE_BASE, derive_layer
from speculators.families.research.reference import newer_rope, own_head_size
from speculators.families.signature import Serving, Signature, vllm
from speculators.families.target import Target, servings
from speculators.format.config import LayerConfig, SpeculatorConfig, SpeculatorsConfig
from speculators.format.tensors import TensorSpec, required_tensors

__all__ = ["EAGLE", "LAYERNORM_MAPPINGS", "EagleConfig"]


class EagleLayerConfig(LayerConfig):
    """The draft's one decoder layer."""

    model_type: Literal["llama", "qwen2"] = "llama"
    """``qwen2`` where q, k and v have biases."""


class EagleSpeculatorsConfig(SpeculatorsConfig):
    """How to speculate with the draft."""

    algorithm: Literal["eagle"] = "eagle"


class EagleConfig(SpeculatorConfig):
    """The whole config.json."""

    architectures: list[str]
    """``EagleSpeculator``, then the class of the decoder layer."""
    speculators_model_type: Literal["eagle"] = "eagle"
    """Marks the file as being in this format."""
    transformer_layer_architecture: str
    """The class of the decoder layer, in transformers."""
    transformer_layer_config: EagleLayerConfig
    layernorms: bool = False
    """Whether there are norms on the embedding, on the hidden states, and before the head."""
    fusion_bias: bool = False
    """Whether ``fc`` has a bias."""
    speculators_config: EagleSpeculatorsConfig

    @property
    def features(self) -> frozenset[str]:
        """The features that this config declares (never ``embedding``)."""
        declared = {
            "fusion_bias": self.fusion_bias,
            "layernorms": self.layernorms,
            "attention_bias": self.transformer_layer_config.model_type == "qwen2",
        }
        return frozenset(name for name, there in declared.items() if there)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the layer, and the input width of ``fc``."""
        sizes = self.transformer_layer_config.sizes()
        return sizes | {"embedding+hidden": 2 * sizes["hidden"]}


FEATURES = {
    "embedding": "an embedding of its own",
    "fusion_bias": "a bias on fc",
    "attention_bias": "biases on q, k and v",
    "layernorms": "extra layernorms",
}

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

LAYERNORM_MAPPINGS = {
    "embed_layernorm.weight": "post_embedding_layernorm.weight",
    "lm_head_layernorm.weight": "pre_lm_head_layernorm.weight",
}
"""Names in a research checkpoint → names in the format; every other tensor keeps its name."""

OLDER_PREFIXES = {
    "fusion_fc.": "fc.",
    # Those versions stored the checkpoint's hidden_layernorm under this name. It was trained on the
    # incoming hidden states, before fc; a draft has no input_layernorm of its own.
    "transformer.input_layernorm.": "hidden_layernorm.",
    "transformer.": "layers.0.",
    "embedding_layernorm.": "post_embedding_layernorm.",
}
"""Prefix in files of 0.1.0 to 0.3.0 → prefix now."""

OMISSIONS = {
    r"lm_head\.weight": "logits come from the verifier's own head",
}

LAYERS: dict[bool, dict[str, Any]] = {
    False: {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    True: {"model_type": "qwen2", "use_sliding_window": False},
}
"""Whether q, k and v have biases → the transformers layer that computes what the draft does."""

DECODER_LAYERS = {"llama": "LlamaDecoderLayer", "qwen2": "Qwen2DecoderLayer"}

HINTS = {"bias": "fusion_bias", "qkv_bias": "attention_bias"}

SAME_SIZES = {
    "target_hidden_size": "hidden_size",
    "target_vocab_size": "vocab_size",
    "draft_vocab_size": "vocab_size",
}
"""Key of the verifier's size that trainers write → the key of the draft's, which is the same."""

HASS = re.compile(r"(?<![a-z])hass(?![a-z])", re.IGNORECASE)


def derive(source: Source) -> Derived:
    """Derive the config of a converted draft from a research checkpoint."""
    layer = derive_layer(
        source,
        EagleLayerConfig,
        LAYERS["attention_bias" in source.features],
        HINTS,
        {"tie_word_embeddings": "the head is always the verifier's"} | _same_sizes(source),
    )
    rope_type, base = layer.config.rope_type, layer.config.rope_theta
    if rope_type in {"linear", "dynamic"} and base != REFERENCE_ROPE_BASE:
        # The reference passes rope_theta on only without scaling (cnets1.py, `_init_rope`).
        layer.config.rope_theta = REFERENCE_ROPE_BASE
        layer.discrepancies.insert(
            0,
            f"rope_theta {base:g} is not used: with {rope_type} scaling the reference, and so the "
            f"training, used {REFERENCE_ROPE_BASE:g}",
        )
    decoder_layer = DECODER_LAYERS[layer.config.model_type]
    return Derived(
        layer.config,
        {
            "transformer_layer_architecture": decoder_layer,
            "layernorms": "layernorms" in source.features,
            "fusion_bias": "fusion_bias" in source.features,
        },
        ["EagleSpeculator", decoder_layer],
        layer.discrepancies,
        layer.left_out,
    )


def _same_sizes(source: Source) -> dict[str, str]:
    """The keys that give the verifier's sizes, which are the draft's, too, and why they go.

    Raises:
        ConversionError: if one of them gives another size.

    """
    config = source.checkpoint.config
    for key, own in SAME_SIZES.items():
        if config.get(key) not in {None, config.get(own)}:
            raise ConversionError(
                f"{source.checkpoint.config_file} gives {key} {config[key]!r} and {own} "
                f"{config.get(own)!r}, but such a draft has its verifier's sizes; correct it."
            )
    return {key: f"it is {own}" for key, own in SAME_SIZES.items() if key in config}


def export_config(config: EagleConfig, target: Target) -> dict[str, Any]:
    """The draft's config as research code writes it: flat, like a language model's."""
    layer = config.transformer_layer_config
    values = layer.model_dump()
    if layer.rope_scaling is not None:
        # The reference reads ``type``, newer software ``rope_type``.
        both = {"type": layer.rope_type, "rope_type": layer.rope_type}
        values["rope_scaling"] = layer.rope_scaling | both
    if config.torch_dtype is not None:
        values["torch_dtype"] = config.torch_dtype
    return {**values, "bias": config.fusion_bias, **target.layers[layer.model_type]}


def ambiguity(name: str) -> str:
    """Why a checkpoint of this name may be any of the three."""
    name = PurePath(name).name
    return (
        "Tensors cannot tell EAGLE-1, EAGLE-2 and HASS apart: EAGLE-2 grows another tree with "
        "EAGLE-1's weights, and HASS trains the same module in another way"
        + (f"; the name {name} suggests HASS." if HASS.search(name) else ".")
    )


def _model(model_type: str, architecture: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **keys}


# What each can express, according to vLLM 0.26 to 0.33 (``model_executor/models/llama_eagle.py``),
# SGLang 0.5 (``srt/models/llama_eagle.py``, ``qwen2_eagle.py``, ``srt/speculative``) and the
# reference.
# Both engines read ``bias`` as biases on q, k, v and o; the reference means the bias of fc.
TARGETS = {
    "eagle": Target(
        reader="the EAGLE and HASS research code",
        layers={
            "llama": _model("llama", "LlamaForCausalLM"),
            "qwen2": _model("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        },
        limits=(own_head_size, newer_rope),
    ),
    "vllm": Target(
        reader="vLLM without the plugin",
        layers={
            "llama": _model("llama", "LlamaForCausalLM", bias=False),
            "qwen2": _model("llama", "LlamaForCausalLM", bias=False, qkv_bias=True),
        },
        serving=vllm("eagle", "without the plugin"),
        lacks=frozenset({"fusion_bias", "layernorms"}),
        activation="silu",
        advice=give_each_its_compile_cache,
    ),
    "sglang": Target(
        reader="SGLang",
        layers={
            "llama": _model("llama", "LlamaForCausalLMEagle", bias=False),
            "qwen2": _model("qwen2", "Qwen2ForCausalLMEagle", bias=False),
        },
        serving=Serving("SGLang", "EAGLE"),
        lacks=frozenset({"layernorms"}),
        activation="silu",
        zeros=frozenset({"fusion_bias"}),
        remarks={
            "embedding": "SGLang uses the verifier's embedding, whatever the draft's own holds"
        },
        advice=limit_context,
    ),
}

EAGLE = Family(
    name="eagle",
    noun="an EAGLE-1, EAGLE-2 or HASS draft",
    signature=Signature(
        kind="eagle",
        title="an EAGLE-1 or EAGLE-2 draft",
        marks=r"fc\.(weight|bias)|layers\.0\.(self_attn|mlp)\..*",
        fc_inputs=2,
        lacks="layers.0.input_layernorm.weight",
        hints={"num_hidden_layers": r"1"},
        parts=tuple(required_tensors(TENSORS, ())),
        serving=servings(TARGETS),
    ),
    config=EagleConfig,
    tensors=TENSORS,
    features=FEATURES,
    names=Names(LAYERNORM_MAPPINGS, OLDER_PREFIXES),
    omissions=OMISSIONS,
    derive=derive,
    borrows=("embedding", "head"),
    model="speculators.models.eagle:EagleSpeculator",
    reference="speculators.convert.references.eagle:EagleReference",
    card=Card(
        draft="An EAGLE draft",
        tags=("eagle", "speculative-decoding", "speculators"),
    ),
    export_config=export_config,
    as_converted=Target(
        reader="vLLM with the plugin", serving=vllm("eagle", "with the plugin"), activation="silu"
    ),
    targets=TARGETS,
    flags=(
        Flag("fusion_bias", "Fail unless the draft has fc.bias; it is detected in any case."),
        Flag(
            "layernorms",
            "Fail unless the draft has extra layernorms; they are detected in any case.",
        ),
    ),
    example=("yuhuili/EAGLE-LLaMA3.1-Instruct-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    unusual=("fusion_bias", "attention_bias", "layernorms"),
    beside={
        r"freq_.*\.pt": (
            "is a list of the tokens to draft (FR-Spec), which only SGLang reads: after export "
            "--to sglang, --speculative-algorithm EAGLE --speculative-draft-model-path EXPORT "
            "--speculative-token-map FILE"
        )
    },
    ambiguity=ambiguity,
)
