"""Export: from the speculators format to the layouts that other software reads.

A table says what each target can express, according to vLLM 0.32
(``model_executor/models/llama_eagle.py``), SGLang 0.5 (``srt/models/llama_eagle.py``,
``qwen2_eagle.py``, ``srt/speculative``) and the reference implementation (SafeAILab/EAGLE,
``eagle/model/cnets1.py``).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from speculators.checkpoint.output.staging import check_output, staged_directory
from speculators.checkpoint.output.writer import write_safetensors_file
from speculators.checkpoint.reader import Checkpoint, read_checkpoint
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo
from speculators.convert.eagle import LAYERNORM_MAPPINGS
from speculators.errors import ConversionError
from speculators.families.converted import check_converted
from speculators.format.config import EagleConfig
from speculators.format.layouts import current_name
from speculators.format.tensors import FEATURES, features_of

__all__ = ["TARGETS", "ExportPlan", "Target", "export", "plan_export"]


@dataclass(frozen=True, slots=True)
class Target:
    """A layout to export to.

    Attributes:
        reader: who reads it, for messages.
        layers: ``model_type`` of the draft's layer → the keys of config.json that tell the reader
            which model to build.
        lacks: the features that it cannot express.
        activation: the only one that it computes; ``None`` if it computes any.
        needs_fusion_bias: whether ``fc`` must have a bias; a draft without one gets zeros.
        remarks: feature → a sentence for the log on what becomes of it.

    """

    reader: str
    layers: Mapping[str, Mapping[str, Any]]
    lacks: frozenset[str] = frozenset()
    activation: str | None = None
    needs_fusion_bias: bool = False
    remarks: Mapping[str, str] = field(default_factory=dict)


def _layer(model_type: str, architecture: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **keys}


# Both engines read ``bias`` as biases on q, k, v and o; the reference means the bias of fc.
TARGETS = {
    "eagle": Target(
        reader="the EAGLE and HASS research code",
        layers={
            "llama": _layer("llama", "LlamaForCausalLM"),
            "qwen2": _layer("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        },
    ),
    "vllm": Target(
        reader="vLLM without a plugin",
        layers={
            "llama": _layer("llama", "LlamaForCausalLM", bias=False),
            "qwen2": _layer("llama", "LlamaForCausalLM", bias=False, qkv_bias=True),
        },
        lacks=frozenset({"fusion_bias", "layernorms"}),
        activation="silu",
    ),
    "sglang": Target(
        reader="SGLang",
        layers={
            "llama": _layer("llama", "LlamaForCausalLMEagle", bias=False),
            "qwen2": _layer("qwen2", "Qwen2ForCausalLMEagle", bias=False),
        },
        lacks=frozenset({"layernorms"}),
        activation="silu",
        needs_fusion_bias=True,
        remarks={
            "embedding": "SGLang uses the verifier's embedding, whatever the draft's own holds"
        },
    ),
}
"""The targets of an export, by their names on the command line."""

RESEARCH_NAMES = {name: research for research, name in LAYERNORM_MAPPINGS.items()}

ZEROS = Path("/dev/zero")
"""The file that an all-zero tensor takes its bytes from."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What an export will write.

    Attributes:
        config: the config.json to write.
        tensors: name → the tensor that its bytes come from.
        remarks: sentences for the log.

    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    remarks: list[str]


def export(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Write a converted draft in the layout of another reader.

    The tensors' bytes are copied unchanged. The directory appears complete or not at all.

    Args:
        source: a converted directory, or a Hugging Face id of one.
        output: the directory to create; it must not exist.
        to: a key of ``TARGETS``.
        revision: a branch, tag or commit of ``source`` on the Hub.
        cache_dir: where downloads are kept.

    Returns:
        The path of the directory.

    Raises:
        CheckpointError, HubError: the source cannot be read or fetched.
        FormatError: it is not in the speculators format.
        ConversionError: it has a feature that the target cannot express.
        OutputError: the output exists or cannot be written.

    """
    target = TARGETS[to]
    directory = Path(output).expanduser()
    check_output(directory, overwrite=False, kind=None)
    checkpoint = read_checkpoint(open_repository(source, revision=revision, cache_dir=cache_dir))
    plan = plan_export(checkpoint, target)
    for remark in plan.remarks:
        logger.warning(f"{checkpoint.name}: {remark}")
    with staged_directory(directory, kind=None) as staging:
        config = json.dumps(plan.config, indent=2, ensure_ascii=False)
        (staging / "config.json").write_text(config + "\n", encoding="utf-8")
        write_safetensors_file(
            staging / "model.safetensors",
            {name: PlannedTensor.copy_of(info) for name, info in plan.tensors.items()},
        )
    logger.success(f"Exported for {target.reader}: {directory}")
    return directory


def plan_export(checkpoint: Checkpoint, target: Target) -> ExportPlan:
    """Plan an export.

    Args:
        checkpoint: a converted draft's config and table of tensors.
        target: the layout to export to.

    Raises:
        FormatError: if the draft is not in the speculators format.
        ConversionError: if it has a feature that the target cannot express.

    """
    config = check_converted(checkpoint).config
    stored = {current_name(name): info for name, info in checkpoint.tensors.items()}
    features = features_of(stored)
    if lacking := features & target.lacks:
        raise ConversionError(
            f"{checkpoint.name} has {' and '.join(FEATURES[it] for it in sorted(lacking))}, which "
            f"{target.reader} cannot compute; serve it with vLLM and the plugin that comes with "
            "speculators."
        )
    activation = config.transformer_layer_config.hidden_act
    if target.activation not in {None, activation}:
        raise ConversionError(
            f"{checkpoint.name} has the activation {activation}, and {target.reader} computes "
            f"{target.activation} alone."
        )

    tensors = {RESEARCH_NAMES.get(name, name): info for name, info in stored.items()}
    remarks = [target.remarks[feature] for feature in sorted(features & target.remarks.keys())]
    if target.needs_fusion_bias and "fusion_bias" not in features:
        tensors["fc.bias"] = _zero_bias(stored["fc.weight"])
    return ExportPlan(_research_config(config, target), tensors, remarks)


def _research_config(config: EagleConfig, target: Target) -> dict[str, Any]:
    """The draft's config as research code writes it: flat, like a language model's."""
    layer = config.transformer_layer_config
    values = layer.model_dump()
    if layer.rope_scaling is not None:
        # The reference reads ``type``, newer software ``rope_type``.
        kind = {"type": layer.rope_type, "rope_type": layer.rope_type}
        values["rope_scaling"] = layer.rope_scaling | kind
    if config.torch_dtype is not None:
        values["torch_dtype"] = config.torch_dtype
    return {**values, "bias": config.fusion_bias, **target.layers[layer.model_type]}


def _zero_bias(weight: TensorInfo) -> TensorInfo:
    return TensorInfo("fc.bias", weight.dtype, weight.shape[:1], ZEROS, offset=0)
