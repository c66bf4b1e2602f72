"""What an EAGLE-3 draft can be exported to, and the config.json that each reader takes.

What each can express is by the sources of SafeAILab/EAGLE (``eagle/model/cnets.py``), vLLM 0.32
(``model_executor/models/llama_eagle3.py``), SGLang 0.5.23 (``srt/models/llama_eagle3.py``),
SpecForge 0.2.0, ModelOpt 0.47, TensorRT-LLM (``_torch/models/modeling_speculative.py``) and
llama.cpp b11434 (``conversion/llama.py``, ``src/models/eagle3.cpp``).
"""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from speculators.checkpoint.tensor import Constant, PlannedTensor
from speculators.families.advice import limit_context
from speculators.families.eagle3.config import USUAL_STATES, Eagle3Config
from speculators.families.eagle3.publishers import EXPORTED
from speculators.families.research.reference import newer_rope, own_head_size
from speculators.families.rope_in_gguf import keys_of_rope, misread_rope
from speculators.families.signature import Serving, vllm
from speculators.families.target import Limit, Target, limit, limit_of_layers

__all__ = ["AS_CONVERTED", "TARGETS", "Eagle3Target", "export_config"]


@dataclass(frozen=True, slots=True)
class Eagle3Target(Target):
    """A layout to export to.

    Attributes:
        keys: what config.json has beside the sizes of the draft.

    """

    keys: Callable[[Eagle3Config], dict[str, Any]] = lambda config: {}  # noqa: ARG005


def export_config(config: Eagle3Config, target: Eagle3Target) -> dict[str, Any]:
    """The draft's config as the target's reader takes it: flat, like a language model's."""
    layer = config.transformer_layer_config
    values = layer.model_dump(exclude_none=True) | {"rope_scaling": None}
    values.pop("num_aux_hidden_states", None)
    if layer.rope_scaling is not None:
        # Older software reads ``type``, newer ``rope_type``.
        both = {"type": layer.rope_type, "rope_type": layer.rope_type}
        values["rope_scaling"] = layer.rope_scaling | both
    values["draft_vocab_size"] = config.draft_vocab_size
    values |= {key: config.dtype for key in ("torch_dtype", "dtype") if config.dtype}
    if config.target_hidden_size is not None:
        values["target_hidden_size"] = config.target_hidden_size
    if config.embed_requires_grad and not config.parallel:
        values["embed_requires_grad"] = True
    return values | dict(target.layers[layer.model_type]) | target.keys(config) | EXPORTED


def outputs(config: Eagle3Config) -> list[int]:
    """The layers that the states leave."""
    return [layer - 1 for layer in config.eagle_aux_hidden_state_layer_ids]


@limit("more than one layer")
def several_layers(config: Eagle3Config) -> str | None:
    return f"has {config.layers} layers" if config.layers > 1 else None


@limit("`norm_before_residual`")
def residual_norm(config: Eagle3Config) -> str | None:
    if not config.norm_before_residual:
        return None
    return "takes its residual after the norm (norm_before_residual)"


@limit("`norm_output`")
def feedback_norm(config: Eagle3Config) -> str | None:
    if not config.norm_output:
        return None
    return "feeds back the output after the final norm (norm_output)"


@limit("states of another width than the draft's")
def other_width(config: Eagle3Config) -> str | None:
    return "reads states of another width than its own" if config.target_hidden_size else None


@limit("another number of states than three")
def other_number(config: Eagle3Config) -> str | None:
    return f"reads {config.states} states" if config.states != USUAL_STATES else None


def of_gpt_oss(config: Eagle3Config) -> bool:
    """Whether the verifier is a gpt-oss, of which SGLang also captures what leaves a layer."""
    return any("GptOss" in name for name in config.speculators_config.verifier.architectures)


def if_usual(config: Eagle3Config) -> str:
    """The only number of layers with which a draft can read the reference's."""
    return f"if its verifier has {config.eagle_aux_hidden_state_layer_ids[-1] + 3} layers"


def unless_last(config: Eagle3Config) -> str | None:
    """The number of layers with which the last state that is read is that of the last layer."""
    if of_gpt_oss(config):
        return None
    return f"unless its verifier has {config.eagle_aux_hidden_state_layer_ids[-1]} layers"


@limit_of_layers("other layers than 2, n/2 and n-3", if_usual)
def other_layers(config: Eagle3Config, depth: int | None) -> str | None:
    """Others than the reference's 2, n//2 and n-3 of n; if n is not known, of what n could be."""
    layers = config.eagle_aux_hidden_state_layer_ids
    depth = depth or layers[-1] + 3
    usual = [2, depth // 2, depth - 3]
    if layers == usual:
        return None
    return f"reads the states that enter the layers {layers}, and not {usual}"


@limit_of_layers("the state that leaves the last layer, except of gpt-oss", unless_last)
def last_state(config: Eagle3Config, depth: int | None) -> str | None:
    """What leaves the last layer: SGLang captures what enters a layer, except for gpt-oss.

    So does llama.cpp, except for gpt-oss and verifiers with an MTP of their own.
    """
    layers = config.eagle_aux_hidden_state_layer_ids
    if layers[-1] != depth or of_gpt_oss(config):
        return None
    return f"reads the state that leaves the verifier's last layer (numbered {depth})"


@limit("a single state")
def one_state(config: Eagle3Config) -> str | None:
    """A single state, for which TensorRT-LLM has no ``fc``."""
    return "reads only one state" if config.states == 1 else None


@limit("the state that enters layer 0")
def embeddings_read(config: Eagle3Config) -> str | None:
    """The state that enters layer 0, which leaves none."""
    reads = 0 in config.eagle_aux_hidden_state_layer_ids
    return "reads the verifier's embeddings (numbered 0)" if reads else None


@limit("dynamic RoPE scaling, and YaRN with more than a factor")
def misread_by_llamacpp(config: Eagle3Config) -> str | None:
    """RoPE scaling that llama.cpp's converter drops, or reads otherwise."""
    return misread_rope(config.transformer_layer_config, llama3=True)


@limit("RoPE scaling of a P-EAGLE draft")
def scaled_rope_in_parallel(config: Eagle3Config) -> str | None:
    """RoPE scaling of a P-EAGLE draft, which SpecForge ignores."""
    scaled = config.parallel and config.transformer_layer_config.rope_type != "default"
    return "has RoPE scaling and drafts in parallel" if scaled else None


@limit("`fc_norm` or `norm_output` of a P-EAGLE draft")
def norms_in_parallel(config: Eagle3Config) -> str | None:
    both = config.parallel and (config.fc_norm or config.norm_output)
    return "drafts in parallel and has EAGLE-3.1's norms" if both else None


@limit("attention biases beside norms on queries and keys")
def qwen3_biases(config: Eagle3Config) -> str | None:
    layer = config.transformer_layer_config
    both = layer.model_type == "qwen3" and layer.attention_bias
    return "has biases in the attention beside norms on queries and keys" if both else None


@limit("a single state of the draft's own width")
def one_wide_state(config: Eagle3Config) -> str | None:
    same = config.sizes["states"] == config.transformer_layer_config.hidden_size
    return "reads no more than one state, of its own width" if same else None


@limit("layers of a DeepSeek verifier that do not start with 2")
def other_numbering(config: Eagle3Config) -> str | None:
    """Layers that SGLang would misread for DeepSeek: it adds 1 only if the first one is 1."""
    verifiers = config.speculators_config.verifier.architectures
    deepseek = any("Deepseek" in name for name in verifiers)
    if not deepseek or config.eagle_aux_hidden_state_layer_ids[0] == 2:
        return None
    return "reads other layers of a DeepSeek verifier than those that start with 2"


def unless_parallel(it: Limit) -> Limit:
    """A limit that does not concern P-EAGLE drafts."""
    return Limit(
        f"{it.what}, except of a P-EAGLE draft",
        lambda config, depth: None if config.parallel else it.found(config, depth),
    )


def _nested(config: Eagle3Config, **keys: Any) -> dict[str, Any]:
    """``eagle_config``, with the layers by the states that leave them."""
    return {
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": outputs(config),
            "use_aux_hidden_state": True,
            **keys,
        }
    }


def _norms(config: Eagle3Config) -> dict[str, Any]:
    flags = ("norm_before_fc", "fc_norm", "norm_output")
    return {flag: True for flag in flags if getattr(config, flag)}


def _count(config: Eagle3Config) -> dict[str, Any]:
    return {} if config.states == USUAL_STATES else {"num_aux_hidden_states": config.states}


def _mask(config: Eagle3Config) -> dict[str, Any]:
    return {"mask_token_id": config.mask_token_id} if config.parallel else {}


def _keys_of_vllm(config: Eagle3Config) -> dict[str, Any]:
    return {
        "eagle_aux_hidden_state_layer_ids": config.eagle_aux_hidden_state_layer_ids,
        "norm_before_residual": config.norm_before_residual,
        **_norms(config),
        **_count(config),
        **_mask(config),
        **({"pard_token": config.mask_token_id} if config.parallel else {}),
    }


def _keys_of_specforge(config: Eagle3Config) -> dict[str, Any]:
    if not config.parallel:
        return _nested(config) | _norms(config)
    return {
        **_nested(config),
        **_mask(config),
        "architectures": ["PEagleDraftModel"],
        "norm_before_residual": config.norm_before_residual,
    }


def _keys_of_modelopt(config: Eagle3Config) -> dict[str, Any]:
    return _nested(
        config,
        use_input_layernorm_in_first_layer=True,
        use_last_layernorm=True,
        use_mtp_layernorm=False,
        next_layer_regular=True,
        parallel_draft_step=1,
        parallel_draft_heads_num_layers=1,
    )


def _keys_of_trtllm(config: Eagle3Config) -> dict[str, Any]:
    nested = _nested(config, **({"norm_before_fc": True} if config.norm_before_fc else {}))
    top = {key: value for key, value in _norms(config).items() if key != "norm_before_fc"}
    return nested | top | _count(config) | ({"bias": True} if config.fc_bias else {})


def _keys_of_sglang(config: Eagle3Config) -> dict[str, Any]:
    bias = {"bias": True} if config.fc_bias else {}
    return _nested(config) | _norms(config) | _count(config) | bias


def _keys_of_llamacpp(config: Eagle3Config) -> dict[str, Any]:
    return {
        "eagle_aux_hidden_state_layer_ids": config.eagle_aux_hidden_state_layer_ids,
        "norm_before_residual": config.norm_before_residual,
        **({"norm_before_fc": True} if config.norm_before_fc else {}),
        **keys_of_rope(config.transformer_layer_config),
    }


def _whole_vocabulary(config: Eagle3Config) -> dict[str, PlannedTensor]:
    """The tables of a draft with the verifier's vocabulary, which SpecForge stores all the same."""
    if config.draft_vocab_size != config.transformer_layer_config.vocab_size:
        return {}
    size = config.draft_vocab_size
    offsets, flags = array("q", bytes(8 * size)).tobytes(), b"\1" * size
    return {
        "d2t": PlannedTensor("I64", (size,), (Constant("zeros", "I64", offsets),)),
        "t2d": PlannedTensor("BOOL", (size,), (Constant("ones", "BOOL", flags),)),
    }


def _advice_on_specforge(config: Eagle3Config) -> str | None:
    if not config.norm_output:
        return None
    return (
        "SpecForge up to 0.2.0 reads norm_output otherwise, and feeds back the output before the "
        "final norm; it takes pull request 879 (September 2026)"
    )


def _advice_on_llamacpp(config: Eagle3Config) -> str:
    verifier = config.speculators_config.verifier.name_or_path
    return (
        "give convert_hf_to_gguf.py the option --target-model-dir with the directory of "
        f"{verifier}, where it finds the tokenizer; converters from before July 2026 do not read "
        "which states the draft takes, and write those of the layers 2, n/2 and n-3"
    )


def _advice_on_trtllm(config: Eagle3Config) -> str:
    return (
        "TensorRT-LLM does not read from the draft which states it takes: set "
        f"eagle3_layers_to_capture to {outputs(config)}"
    )


MIDLAYER: Mapping[str, str] = {"layers.0.": "midlayer."}


def _midlayer(config: Eagle3Config) -> Mapping[str, str]:
    """The prefix of a draft's only layer; P-EAGLE's are numbered."""
    return {} if config.parallel else MIDLAYER


def _llama(architecture: str) -> dict[str, dict[str, Any]]:
    return {"llama": {"model_type": "llama", "architectures": [architecture]}}


VLLM: dict[str, Any] = {
    "serving": vllm("eagle3"),
    "variants": ((lambda config: config.parallel, vllm("eagle3", parallel_drafting=True)),),
    "lacks": frozenset({"fc_bias"}),
    "activation": "silu",
}
"""What vLLM (0.29 to 0.33) takes in either layout."""

AS_CONVERTED = Target(
    "vLLM",
    # Its reader of P-EAGLE drafts in this format passes neither fc_norm nor norm_output on.
    limits=(qwen3_biases, norms_in_parallel),
    **VLLM,
)

BIASES_AND_NORMS = frozenset({"attention_bias", "mlp_bias", "qk_norm"})

TARGETS: dict[str, Eagle3Target] = {
    "eagle": Eagle3Target(
        "the EAGLE research code",
        limits=(
            several_layers,
            residual_norm,
            feedback_norm,
            other_number,
            own_head_size,
            newer_rope,
            other_layers,
        ),
        layers=_llama("LlamaForCausalLM"),
        lacks=BIASES_AND_NORMS | {"fc_bias", "fc_norm", "input_norm", "mask_hidden"},
        prefixes=_midlayer,
    ),
    "vllm": Eagle3Target(
        "vLLM without the plugin",
        limits=(qwen3_biases,),
        layers=_llama("LlamaForCausalLMEagle3")
        | {"qwen3": {"model_type": "qwen3", "architectures": ["Eagle3Qwen3ForCausalLM"]}},
        keys=_keys_of_vllm,
        remarks={
            "mask_hidden": (
                "vLLM drafts in parallel with the method eagle3 and parallel_drafting true"
            )
        },
        **VLLM,
    ),
    "sglang": Eagle3Target(
        "SGLang",
        limits=(
            several_layers,
            residual_norm,
            one_wide_state,
            embeddings_read,
            other_numbering,
            last_state,
        ),
        serving=Serving("SGLang", "EAGLE3"),
        layers=_llama("LlamaForCausalLMEagle3"),
        lacks=BIASES_AND_NORMS | {"mask_hidden"},
        prefixes=_midlayer,
        keys=_keys_of_sglang,
        activation="silu",
        remarks={
            "embedding": (
                "SGLang uses the verifier's embedding, whatever the draft's own holds, unless "
                "their hidden sizes differ"
            ),
        },
        advice=limit_context,
    ),
    "specforge": Eagle3Target(
        "SpecForge",
        limits=(
            unless_parallel(several_layers),
            unless_parallel(residual_norm),
            norms_in_parallel,
            scaled_rope_in_parallel,
            other_number,
            embeddings_read,
            last_state,  # it trains with what SGLang captures
        ),
        layers=_llama("LlamaForCausalLMEagle3"),
        lacks=BIASES_AND_NORMS | {"fc_bias", "input_norm"},
        prefixes=_midlayer,
        adds=_whole_vocabulary,
        keys=_keys_of_specforge,
        advice=_advice_on_specforge,
    ),
    "modelopt": Eagle3Target(
        "ModelOpt",
        limits=(
            several_layers,
            residual_norm,
            feedback_norm,
            other_width,
            embeddings_read,
        ),
        layers=_llama("LlamaForCausalLMEagle3"),
        lacks=BIASES_AND_NORMS | {"embedding", "fc_bias", "fc_norm", "input_norm", "mask_hidden"},
        drops=frozenset({"t2d"}),
        keys=_keys_of_modelopt,
        remarks={
            None: (
                "ModelOpt (0.47.0) itself computes hidden_norm(input_layernorm(x)) where engines "
                "compute hidden_norm(x)"
            )
        },
    ),
    "llamacpp": Eagle3Target(
        "llama.cpp's convert_hf_to_gguf.py",
        limits=(
            several_layers,
            feedback_norm,
            other_number,
            last_state,
            misread_by_llamacpp,
        ),
        serving=Serving("llama.cpp", "draft-eagle3"),
        layers=_llama("LlamaForCausalLMEagle3"),
        lacks=BIASES_AND_NORMS | {"fc_bias", "fc_norm", "mask_hidden"},
        prefixes=_midlayer,
        keys=_keys_of_llamacpp,
        activation="silu",
        advice=_advice_on_llamacpp,
    ),
    "trtllm": Eagle3Target(
        "TensorRT-LLM",
        limits=(
            several_layers,
            residual_norm,
            embeddings_read,
            one_state,
        ),
        serving=Serving("TensorRT-LLM", "Eagle3"),
        layers=_llama("LlamaForCausalLMEagle3"),
        lacks=BIASES_AND_NORMS | {"mask_hidden"},
        prefixes=_midlayer,
        keys=_keys_of_trtllm,
        activation="silu",
        remarks={
            "embedding": (
                "TensorRT-LLM uses the verifier's embedding, whatever the draft's own holds, "
                "unless their hidden sizes differ"
            ),
        },
        advice=_advice_on_trtllm,
    ),
}
