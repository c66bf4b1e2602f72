"""What DFlash, DFlash 2 and DSpark drafts can be exported to.

What each reader takes is by the sources of z-lab's ``dflash`` 0.1.0, vLLM 0.32 and 0.33
(``model_executor/models/qwen3_dflash.py``, ``qwen3_dflash2.py``, ``qwen3_dspark.py``), SGLang
0.5.23 (``srt/models/dflash.py``, ``dspark.py``, ``srt/speculative/dflash_utils.py``) and llama.cpp
b11434 (``conversion/qwen.py``, ``src/models/dflash.cpp``, ``common/speculative.cpp``). All of them
read one native layout, which is flat and nests what is DFlash's own in ``dflash_config``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from speculators.families.advice import limit_context
from speculators.families.dflash.attention import is_usual
from speculators.families.dflash.config import SCALES, DFlash2Config, DFlashConfig, DSparkConfig
from speculators.families.rope_in_gguf import keys_of_rope, misread_rope
from speculators.families.signature import Serving, vllm
from speculators.families.target import Limit, Target, limit, limit_of_layers

__all__ = [
    "DFLASH2_AS_CONVERTED",
    "DFLASH2_TARGETS",
    "DFLASH_AS_CONVERTED",
    "DFLASH_TARGETS",
    "DSPARK_AS_CONVERTED",
    "DSPARK_TARGETS",
    "export_config",
]

SELECTOR = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
HEADS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DFlashTarget(Target):
    """A layout to export to.

    Attributes:
        keys: what config.json has beside what all native layouts have.

    """

    keys: Callable[[Any], dict[str, Any]] = lambda config: {}  # noqa: ARG005


def export_config(config: DFlashConfig, target: DFlashTarget) -> dict[str, Any]:
    """The draft's config in the native layout: flat, with ``dflash_config``."""
    layer = config.transformer_layer_config
    values = layer.model_dump(exclude_none=True) | {"rope_scaling": None}
    values.pop("is_causal", None)
    if layer.is_neox_style:
        del values["is_neox_style"]
    if layer.rope_scaling is not None:
        # Older software reads ``type``, newer ``rope_type``.
        both = {"type": layer.rope_type, "rope_type": layer.rope_type}
        values["rope_scaling"] = layer.rope_scaling | both
    values |= {"sliding_window": layer.sliding_window, "block_size": config.block_size}
    values |= {key: config.dtype for key in ("torch_dtype", "dtype") if config.dtype}
    for key in ("num_target_layers", "target_hidden_size"):
        if (value := getattr(config, key)) is not None:
            values[key] = value
    if config.draft_vocab_size != layer.vocab_size:
        values["draft_vocab_size"] = config.draft_vocab_size
    if not is_usual(layer.layer_types, config.causal):
        # All three readers look at it first; they do not agree on dflash_config.causal.
        values["is_causal"] = config.causal[0]
    return values | dict(target.layers["qwen3"]) | target.keys(config)


def _nested(config: DFlashConfig) -> dict[str, Any]:
    """``dflash_config`` with the keys of DFlash."""
    return {
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": config.target_layer_ids,
        }
    }


def _dflash2(config: DFlash2Config) -> dict[str, Any]:
    own = {key: getattr(config, key) for key in (*SELECTOR, *SCALES)}
    nested = _nested(config)["dflash_config"]
    return {"dflash_config": nested | {key: it for key, it in own.items() if it is not None}}


def _dspark(config: DSparkConfig) -> dict[str, Any]:
    """DeepSpec's layout, which vLLM and SGLang read at the top."""
    return {
        "target_layer_ids": config.target_layer_ids,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        **{key: getattr(config, key) for key in HEADS},
    }


def _dflash_for_vllm(config: DFlashConfig) -> dict[str, Any]:
    """DFlash, or a DSpark draft with a Markov head of rank 0 if it samples from the anchor."""
    if not config.sample_from_anchor:
        return _nested(config)
    return {
        "architectures": ["Qwen3DSparkModel"],
        "target_layer_ids": config.target_layer_ids,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": True,
        "markov_rank": 0,
        "enable_confidence_head": False,
    }


@limit("a first token that is drafted at the anchor's position")
def samples_anchor(config: DFlashConfig) -> str | None:
    return "samples from the anchor" if config.sample_from_anchor else None


@limit("states of another width than the draft's")
def other_width(config: DFlashConfig) -> str | None:
    return "reads states of another width than its own" if config.target_hidden_size else None


@limit("the state that enters layer 0")
def embeddings_read(config: DFlashConfig) -> str | None:
    """The state that enters layer 0, which leaves none."""
    reads = 0 in config.aux_hidden_state_layer_ids
    return "reads the verifier's embeddings (numbered 0)" if reads else None


@limit("a mask token with an embedding of its own")
def own_mask(config: DFlashConfig) -> str | None:
    return "has a mask embedding of its own (mask_embedding.pt)" if config.mask_embedding else None


@limit("such a mask token of a draft that samples from the anchor")
def anchored_mask(config: DFlashConfig) -> str | None:
    """Both: vLLM serves what samples from the anchor as DSpark, which reads no mask embedding."""
    both = config.sample_from_anchor and config.mask_embedding
    return "samples from the anchor and has a mask embedding of its own" if both else None


@limit("RoPE that pairs neighbouring channels")
def paired_rope(config: DFlashConfig) -> str | None:
    paired = not config.transformer_layer_config.is_neox_style
    return "has RoPE that pairs neighbouring channels (is_neox_style false)" if paired else None


@limit("a verifier of an unknown number of layers")
def depth_unknown(config: DFlashConfig) -> str | None:
    """No number of the verifier's layers, which the reference always reads."""
    unknown = config.num_target_layers is None
    return "does not say how many layers its verifier has" if unknown else None


@limit("Markov heads other than vanilla ones")
def other_markov(config: DFlashConfig) -> str | None:
    kind = getattr(config, "markov_head_type", "vanilla")
    called = {"rnn": "recurrent (rnn)"}.get(kind, kind)
    return f"has a {called} Markov head" if kind != "vanilla" else None


@limit("layers that are causal, or not, unlike others of their type")
def causal_full(config: DFlashConfig) -> str | None:
    usual = is_usual(config.transformer_layer_config.layer_types, config.causal)
    return None if usual else "has layers that are causal, or not, unlike others of their type"


@limit("layers that are causal beside layers that are not")
def mixed_causality(config: DFlashConfig) -> str | None:
    return (
        "has layers that are causal, and others that are not"
        if len(set(config.causal)) > 1
        else None
    )


@limit("windows shorter than a block that is not causal")
def short_window(config: DFlashConfig) -> str | None:
    """A window that ends inside a block that is not causal: llama.cpp ends it backwards only."""
    window = config.transformer_layer_config.sliding_window
    short = window is not None and window < config.block_size and not all(config.causal)
    return "has windows that are shorter than its blocks, and not causal" if short else None


@limit("dynamic and Llama 3's RoPE scaling, and YaRN with more than a factor")
def misread_by_llamacpp(config: DFlashConfig) -> str | None:
    """RoPE scaling that llama.cpp's converter drops, or reads otherwise."""
    return misread_rope(config.transformer_layer_config, llama3=False)


def unless_last(config: DFlashConfig) -> str | None:
    """The number of layers with which the last state that is read is that of the last layer."""
    if config.num_target_layers is not None:
        return None
    return f"unless its verifier has {config.aux_hidden_state_layer_ids[-1]} layers"


@limit_of_layers("the state that leaves the verifier's last layer", unless_last)
def last_state(config: DFlashConfig, depth: int | None) -> str | None:
    """What leaves the verifier's last layer, of which llama.cpp keeps only what enters layers."""
    last = config.aux_hidden_state_layer_ids[-1]
    if last != (config.num_target_layers or depth):
        return None
    return f"reads the state that leaves the verifier's last layer (numbered {last})"


@limit("a confidence head without the Markov embedding")
def lone_confidence(config: DFlashConfig) -> str | None:
    without = getattr(config, "confidence_head_with_markov", True) is False
    lone = without and getattr(config, "enable_confidence_head", False)
    return "has a confidence head without the Markov embedding" if lone else None


@limit("layers that slide")
def sliding(config: DFlashConfig) -> str | None:
    slides = config.transformer_layer_config.use_sliding_window
    return "has layers that slide" if slides else None


@limit("DFlash 2's scales")
def scaled(config: DFlashConfig) -> str | None:
    given = [key for key in SCALES if getattr(config, key, None) is not None]
    return f"has {given[0]}" if given else None


def _called(architecture: str) -> dict[str, dict[str, Any]]:
    return {"qwen3": {"model_type": "qwen3", "architectures": [architecture]}}


def _served_as_dspark(config: DFlashConfig) -> str | None:
    if not config.sample_from_anchor:
        return None
    return (
        "it samples from the anchor, so it is written as DeepSpec does, as a DSpark draft with a "
        "Markov head of rank 0: serve it with the method dspark, without tensor parallelism"
    )


def _advice_on_llamacpp(config: DFlashConfig) -> str:
    verifier = config.speculators_config.verifier.name_or_path
    return (
        "give convert_hf_to_gguf.py the option --target-model-dir with the directory of "
        f"{verifier}: it takes the tokenizer from there"
    )


OWN = frozenset({"embedding", "head", "draft_vocabulary"})
EMPTY: Mapping[str | None, str] = {}
IGNORES_OWN = {
    "embedding": "{reader} uses the verifier's embedding, whatever the draft's own holds",
    "head": "{reader} uses the verifier's head, whatever the draft's own holds",
}


def _ignores_own(reader: str) -> dict[str | None, str]:
    return {feature: remark.format(reader=reader) for feature, remark in IGNORES_OWN.items()}


def _reference(architecture: str, keys: Callable[[Any], dict[str, Any]]) -> DFlashTarget:
    """z-lab's own code, and its layout."""
    return DFlashTarget(
        reader="z-lab's dflash",
        layers=_called(architecture),
        lacks=OWN,
        limits=(samples_anchor, other_width, own_mask, paired_rope, depth_unknown),
        keys=keys,
    )


def _vllm(
    method: str,
    architecture: str,
    keys: Callable[[Any], dict[str, Any]],
    *limits: Limit,
    **settings: Any,
) -> DFlashTarget:
    return DFlashTarget(
        reader="vLLM",
        layers=_called(architecture),
        serving=vllm(method),
        limits=limits,
        keys=keys,
        activation="silu",
        **settings,
    )


def _as_converted(method: str, *limits: Limit) -> Target:
    return Target("vLLM", serving=vllm(method), limits=limits, activation="silu")


def _sglang(
    algorithm: str, architecture: str, keys: Callable[[Any], dict[str, Any]], *limits: Limit
) -> DFlashTarget:
    return DFlashTarget(
        reader="SGLang",
        layers=_called(architecture),
        serving=Serving("SGLang", algorithm),
        lacks=frozenset({"draft_vocabulary"}),
        limits=(other_width, embeddings_read, *limits),
        keys=keys,
        activation="silu",
        remarks=_ignores_own("SGLang"),
        advice=limit_context,
    )


def _for_llamacpp(keys: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The keys of a native layout as llama.cpp's converter takes them.

    To it, layers that slide are not causal either unless ``is_causal`` says so.
    """

    def named(config: DFlashConfig) -> dict[str, Any]:
        layer = config.transformer_layer_config
        return {
            **keys(config),
            **keys_of_rope(layer),
            **({"is_causal": all(config.causal)} if layer.use_sliding_window else {}),
            **({} if layer.is_neox_style else {"rope_is_neox_style": False}),
        }

    return named


def _dspark_for_llamacpp(config: DSparkConfig) -> dict[str, Any]:
    """DSpark's keys, and that the converter is to leave out the draft's own embedding.

    It leaves out a head of the whole vocabulary anyway, and llama.cpp then takes an embedding, if
    there is one, as the head, too.
    """
    return _dspark(config) | {"has_embed_tokens": False}


def _llamacpp(
    spec_type: str,
    architecture: str,
    keys: Callable[[Any], dict[str, Any]],
    *limits: Limit,
    lacks: frozenset[str] = OWN,
    ignores: Mapping[str | None, str] = EMPTY,
) -> DFlashTarget:
    """What llama.cpp's converter takes, and llama.cpp then computes."""
    return DFlashTarget(
        reader="llama.cpp's convert_hf_to_gguf.py",
        layers=_called(architecture),
        serving=Serving("llama.cpp", spec_type),
        lacks=lacks | {"attention_bias"},
        limits=(
            other_width,
            last_state,
            own_mask,
            mixed_causality,
            short_window,
            misread_by_llamacpp,
            *limits,
        ),
        keys=_for_llamacpp(keys),
        activation="silu",
        remarks=ignores,
        advice=_advice_on_llamacpp,
    )


def _trtllm(architecture: str, keys: Callable[[Any], dict[str, Any]]) -> DFlashTarget:
    """What TensorRT-LLM's PyTorch backend takes: blocks that are bidirectional, without windows."""
    return DFlashTarget(
        reader="TensorRT-LLM",
        layers=_called(architecture),
        serving=Serving("TensorRT-LLM", "DFlash"),
        lacks=frozenset({"draft_vocabulary"}),
        limits=(
            samples_anchor,
            other_width,
            embeddings_read,
            own_mask,
            paired_rope,
            sliding,
            causal_full,
        ),
        keys=keys,
        activation="silu",
        remarks=_ignores_own("TensorRT-LLM"),
    )


DFLASH_AS_CONVERTED = _as_converted("dflash", samples_anchor)
DFLASH_TARGETS = {
    "dflash": _reference("DFlashDraftModel", _nested),
    "vllm": _vllm(
        "dflash",
        "DFlashDraftModel",
        _dflash_for_vllm,
        anchored_mask,
        variants=(
            (
                lambda config: config.sample_from_anchor,
                vllm("dspark", "without tensor parallelism"),
            ),
        ),
        advice=_served_as_dspark,
    ),
    "sglang": _sglang("DFLASH", "DFlashDraftModel", _nested, samples_anchor),
    "llamacpp": _llamacpp("draft-dflash", "DFlashDraftModel", _nested, samples_anchor),
    "trtllm": _trtllm("DFlashDraftModel", _nested),
}
DFLASH2_AS_CONVERTED = _as_converted("dflash", samples_anchor, scaled)
DFLASH2_TARGETS = {
    "dflash": _reference("DFlash2DraftModel", _dflash2),
    "vllm": _vllm("dflash", "DFlash2DraftModel", _dflash2, samples_anchor),
    "sglang": _sglang("DFLASH", "DFlash2DraftModel", _dflash2, samples_anchor),
    "llamacpp": _llamacpp("draft-dflash", "DFlash2DraftModel", _dflash2, samples_anchor),
}
# No engine reads a mask embedding of a DSpark draft.
DSPARK_AS_CONVERTED = _as_converted("dspark", other_markov, own_mask)
DSPARK_TARGETS = {
    "vllm": _vllm("dspark", "Qwen3DSparkModel", _dspark, other_markov, own_mask),
    "sglang": _sglang("DSPARK", "Qwen3DSparkModel", _dspark, own_mask),
    "llamacpp": _llamacpp(
        "draft-dspark",
        "Qwen3DSparkModel",
        _dspark_for_llamacpp,
        other_markov,
        lone_confidence,
        lacks=frozenset(),
        ignores={
            "embedding": IGNORES_OWN["embedding"].format(reader="llama.cpp"),
            "head": (
                "llama.cpp uses the verifier's head, whatever the draft's own holds, unless the "
                "draft has a vocabulary of its own"
            ),
        },
    ),
}
