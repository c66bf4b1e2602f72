"""The plan of a conversion: a plain value, complete before anything is written."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from speculators import __version__
from speculators.checkpoint.reader import Checkpoint
from speculators.checkpoint.tensor import DTYPE_BITS, TensorInfo, describe_shape
from speculators.checkpoint.verifier import Verifier
from speculators.errors import ConversionError
from speculators.families.layer import plan_layer
from speculators.families.recognition import listed, recognise, strip_prefix
from speculators.format.config import (
    EagleConfig,
    LayerConfig,
    SpeculatorsConfig,
    VerifierReference,
)
from speculators.format.tensors import DTYPES, FEATURES, features_of, required_tensors

__all__ = ["ConversionPlan", "DraftPlan", "plan_conversion", "plan_draft"]

DECODER_LAYERS = {"llama": "LlamaDecoderLayer", "qwen2": "Qwen2DecoderLayer"}


OMISSIONS = {
    r"lm_head\.weight": "logits come from the verifier's own head",
    r"layers\.0\.self_attn\.rotary_emb\.inv_freq": "it is computed from the config",
}
"""Pattern of tensors that a checkpoint may have, but the format leaves out → why."""


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What a conversion makes of a draft, whatever its verifier is.

    Attributes:
        source: the checkpoint.
        layer: the config of its decoder layer, as the format has it.
        features: the keys of ``format.tensors.FEATURES`` that the tensors show.
        dtype: the dtype of the tensors, by torch's name; ``float32`` if they differ.
        tensors: target name → the source tensor that its bytes come from.
        left_out: source name → why the tensor is left out.
        config_left_out: key of the source's config → why it is left out.
        odd: sentences for the log: where config, tensors and reference disagree.

    """

    source: Checkpoint
    layer: LayerConfig
    features: frozenset[str]
    dtype: str
    tensors: dict[str, TensorInfo]
    left_out: dict[str, str]
    config_left_out: dict[str, str]
    odd: list[str]


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion will write, where each part comes from, and what is odd about it.

    Attributes:
        source: the checkpoint.
        verifier: the model that it was trained for.
        config: the config.json to write.
        tensors: target name → the source tensor that its bytes come from.
        left_out: source name → why the tensor is left out.
        config_left_out: key of the source's config → why it is left out.
        odd: sentences for the log: where config, tensors and reference disagree.
        rounded_to: the dtype that all tensors are rounded to, a key of ``DTYPES``; ``None`` if each
            keeps its own.

    """

    source: Checkpoint
    verifier: Verifier
    config: EagleConfig
    tensors: dict[str, TensorInfo]
    left_out: dict[str, str]
    config_left_out: dict[str, str]
    odd: list[str]
    rounded_to: str | None = None

    @property
    def nbytes(self) -> int:
        """The size of all tensors as written, in bytes."""
        return sum(
            info.elements * DTYPE_BITS[self.rounded_to or info.dtype] // 8
            for info in self.tensors.values()
        )


def plan_conversion(
    checkpoint: Checkpoint,
    verifier: Verifier,
    renames: dict[str, str],
    *,
    fusion_bias: bool = False,
    layernorms: bool = False,
    rounded_to: str | None = None,
) -> ConversionPlan:
    """Plan the conversion of an EAGLE-1, EAGLE-2 or HASS checkpoint.

    Args:
        checkpoint: its config and table of tensors.
        verifier: the model that it was trained for.
        renames: source name → target name, where they differ.
        fusion_bias: fail unless there is ``fc.bias``. The tensors decide in any case.
        layernorms: fail unless there are extra layernorms; likewise.
        rounded_to: the dtype to round all tensors to, a key of ``DTYPES``; each keeps its own if
            not given.

    Raises:
        ConversionError: if the tensors are not those of such a checkpoint, or contradict the
            config or the flags; the message names them.
        VerifierError: if the verifier has other sizes.

    """
    draft = plan_draft(checkpoint, renames)
    flags = {"fusion_bias": fusion_bias, "layernorms": layernorms}
    _check_flags(checkpoint, draft.features, flags)
    verifier.check_fits(draft.layer.hidden_size, draft.layer.vocab_size)

    decoder_layer = DECODER_LAYERS[draft.layer.model_type]
    config = EagleConfig(
        architectures=["EagleSpeculator", decoder_layer],
        speculators_version=__version__,
        torch_dtype=DTYPES[rounded_to] if rounded_to else draft.dtype,
        transformer_layer_architecture=decoder_layer,
        transformer_layer_config=draft.layer,
        layernorms="layernorms" in draft.features,
        fusion_bias="fusion_bias" in draft.features,
        speculators_config=SpeculatorsConfig(
            verifier=VerifierReference(
                name_or_path=verifier.name, architectures=list(verifier.architectures)
            )
        ),
    )
    return ConversionPlan(
        checkpoint,
        verifier,
        config,
        draft.tensors,
        draft.left_out,
        draft.config_left_out,
        draft.odd,
        rounded_to,
    )


def plan_draft(checkpoint: Checkpoint, renames: dict[str, str]) -> DraftPlan:
    """Plan what becomes of a draft's tensors and config, without its verifier.

    Args:
        checkpoint: its config and table of tensors.
        renames: source name → target name, where they differ.

    Raises:
        ConversionError: if the tensors are not those of an EAGLE-1, EAGLE-2 or HASS checkpoint,
            or contradict the config; the message names them.

    """
    _refuse_other_families(checkpoint)
    stored = _without_prefix(checkpoint)

    left_out = {
        info.name: why for name, info in stored.items() if (why := _reason_to_leave_out(name))
    }
    tensors = {
        renames.get(name, name): info for name, info in stored.items() if info.name not in left_out
    }
    features = features_of(tensors)
    _check_names(checkpoint, tensors, features, renames)
    _check_dtypes(stored.values())
    layer = plan_layer(checkpoint, tensors, features)
    _check_shapes(checkpoint, tensors, layer.config.dimensions())
    dtype = _dtype_of(tensors.values())
    return DraftPlan(
        checkpoint, layer.config, features, dtype, tensors, left_out, layer.left_out, layer.odd
    )


def _refuse_other_families(checkpoint: Checkpoint) -> None:
    found = recognise(checkpoint.config, checkpoint.tensors)
    if found.family and found.family.advice:
        raise ConversionError(
            f"{checkpoint.name} holds {found.family.name} ({found.evidence[0]}), not an EAGLE-1, "
            f"EAGLE-2 or HASS draft; {found.family.advice}."
        )
    if found.quantized:
        raise ConversionError(
            f"{checkpoint.name} holds quantized weights ({found.quantized[0]}), which are not "
            "converted; give the original, unquantized checkpoint."
        )
    if found.family is None:
        near = "; ".join(map(str, found.near)) or "none of these is in any of them"
        raise ConversionError(
            f"{checkpoint.name} is not an EAGLE checkpoint, nor of another kind that is known: "
            f"it has {listed(checkpoint.tensors)}; {near}."
        )


def _without_prefix(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    stored: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        short = strip_prefix(name)
        if short in stored:
            raise ConversionError(
                f"{checkpoint.name} has {stored[short].name} and {name}, which are the same "
                "tensor to the reference; remove the one that was not trained."
            )
        stored[short] = info
    return stored


def _reason_to_leave_out(name: str) -> str | None:
    """Why the tensor called ``name`` (without prefix) is left out; ``None`` if it is not."""
    return next((why for form, why in OMISSIONS.items() if re.fullmatch(form, name)), None)


def _check_names(
    checkpoint: Checkpoint,
    tensors: dict[str, TensorInfo],
    features: frozenset[str],
    renames: dict[str, str],
) -> None:
    required = required_tensors(features)
    unknown = [info.name for name, info in tensors.items() if name not in required]
    source_names = {target: source for source, target in renames.items()}
    missing = [source_names.get(name, name) for name in required if name not in tensors]
    if unknown or missing:
        problems = [
            text
            for names, text in (
                (missing, f"it lacks {listed(missing, len(missing))}"),
                (unknown, f"it has unknown {listed(unknown, len(unknown))}"),
            )
            if names
        ]
        shown = ", ".join(FEATURES[feature] for feature in sorted(features))
        raise ConversionError(
            f"{checkpoint.name} does not have the tensors of an EAGLE checkpoint"
            f"{f' with {shown}' if shown else ''}: {', and '.join(problems)}; "
            "nothing is invented or dropped, so give the complete checkpoint."
        )


def _check_flags(checkpoint: Checkpoint, features: frozenset[str], flags: dict[str, bool]) -> None:
    for feature, asked in flags.items():
        if asked and feature not in features:
            raise ConversionError(
                f"{checkpoint.name} has no {FEATURES[feature].removeprefix('a ')}, which "
                f"{feature} asks for; leave it out: what the tensors have is found by itself."
            )


def _check_dtypes(tensors: Collection[TensorInfo]) -> None:
    for info in tensors:
        if info.dtype not in DTYPES:
            raise ConversionError(
                f"{info.file}: {info.name} has the type {info.dtype}, so its weights are quantized "
                f"or not a draft's; a draft's are one of {', '.join(DTYPES)}."
            )


def _dtype_of(tensors: Collection[TensorInfo]) -> str:
    found = {info.dtype for info in tensors}
    return DTYPES[found.pop()] if len(found) == 1 else "float32"  # which holds the values of both


def _check_shapes(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], sizes: dict[str, int]
) -> None:
    for name, spec in required_tensors(FEATURES).items():
        if name in tensors and tensors[name].shape != spec.shape(sizes):
            info = tensors[name]
            raise ConversionError(
                f"{info.file}: {info.name} has the shape {describe_shape(info.shape)}, but with "
                f"{Path(checkpoint.config_file).name} it should have "
                f"{describe_shape(spec.shape(sizes))}; give the config that belongs to the tensors."
            )
