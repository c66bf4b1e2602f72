"""The plan of a conversion: a value that says everything, made before anything is written."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from speculators import __version__
from speculators.checkpoint.reader import Checkpoint
from speculators.checkpoint.rounding import FLOATS
from speculators.checkpoint.tensor import DTYPE_BITS, TensorInfo, describe_shape
from speculators.checkpoint.verifier import Verifier
from speculators.convert.eagle.families import (
    reason_to_leave_out,
    recognise_other_family,
    strip_prefix,
)
from speculators.convert.eagle.layer_config import plan_layer
from speculators.errors import ConversionError
from speculators.format.config import (
    EagleConfig,
    SpeculatorsConfig,
    VerifierReference,
)
from speculators.format.tensors import FEATURES, features_of, required_tensors

__all__ = ["DTYPES", "ConversionPlan", "plan_conversion"]

DTYPES = {stored: kind.name for stored, kind in FLOATS.items()}
"""Dtypes that a draft may have, and torch's names for them."""

DECODER_LAYERS = {"llama": "LlamaDecoderLayer", "qwen2": "Qwen2DecoderLayer"}


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion will write, where each part comes from, and what is odd about it.

    Attributes:
        source: the checkpoint.
        verifier: the model that it was trained for.
        config: the config.json to be.
        tensors: target name → the source tensor whose bytes it gets.
        left_out: source name → why the tensor is not taken along.
        config_left_out: key of the source's config → why it does not reach the new one.
        odd: sentences for the log: where config, tensors and reference do not say the same.
        rounded_to: the type that all tensors get, a key of ``DTYPES``; ``None`` if each keeps its
            own.

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
        """Bytes of all tensors, as they are written."""
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
        fusion_bias: the caller says that there is ``fc.bias``: an error if there is not. The
            tensors decide in any case.
        layernorms: the caller says that there are extra layernorms; likewise.
        rounded_to: the type that all tensors get, a key of ``DTYPES``; each keeps its own if not
            given.

    Raises:
        ConversionError: if the tensors are not those of such a checkpoint, or contradict the
            config or the flags; the message names them.
        VerifierError: if the verifier has other sizes.

    """
    _refuse_converted(checkpoint)
    stored = _without_prefix(checkpoint)
    _refuse_other_families(checkpoint, stored)

    left_out = {
        info.name: why for name, info in stored.items() if (why := reason_to_leave_out(name))
    }
    tensors = {
        renames.get(name, name): info for name, info in stored.items() if info.name not in left_out
    }
    features = features_of(tensors)
    _check_names(checkpoint, tensors, features, renames)
    _check_flags(checkpoint, features, {"fusion_bias": fusion_bias, "layernorms": layernorms})
    _check_dtypes(stored.values())
    layer = plan_layer(checkpoint, tensors, features)
    _check_shapes(checkpoint, tensors, layer.config.dimensions())
    verifier.check_fits(layer.config.hidden_size, layer.config.vocab_size)

    decoder_layer = DECODER_LAYERS[layer.config.model_type]
    config = EagleConfig(
        architectures=["EagleSpeculator", decoder_layer],
        speculators_version=__version__,
        torch_dtype=DTYPES[rounded_to] if rounded_to else _dtype_of(tensors.values()),
        transformer_layer_architecture=decoder_layer,
        transformer_layer_config=layer.config,
        layernorms="layernorms" in features,
        fusion_bias="fusion_bias" in features,
        speculators_config=SpeculatorsConfig(
            verifier=VerifierReference(
                name_or_path=verifier.name, architectures=list(verifier.architectures)
            )
        ),
    )
    return ConversionPlan(
        checkpoint, verifier, config, tensors, left_out, layer.left_out, layer.odd, rounded_to
    )


def _refuse_converted(checkpoint: Checkpoint) -> None:
    if "speculators_model_type" in checkpoint.config:
        raise ConversionError(
            f"{checkpoint.name} is in a speculators format already "
            f"({checkpoint.config['speculators_model_type']}); load it with "
            "EagleSpeculator.from_pretrained."
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


def _refuse_other_families(checkpoint: Checkpoint, stored: dict[str, TensorInfo]) -> None:
    if checkpoint.config.get("quantization_config"):
        raise ConversionError(
            f"{checkpoint.config_file} has a quantization_config: quantized weights are not "
            "converted; give the original, unquantized checkpoint."
        )
    if found := recognise_other_family(stored):
        family, evidence = found
        raise ConversionError(
            f"{checkpoint.name} holds {family.name} (it has {_some(evidence)}), not an EAGLE-1, "
            f"EAGLE-2 or HASS draft; {family.advice}."
        )


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
    if len(missing) == len(required_tensors(())):
        raise ConversionError(
            f"{checkpoint.name} is not an EAGLE checkpoint: it has none of "
            f"{_some(missing)}; it has {_some(unknown)}."
        )
    if unknown or missing:
        problems = [
            text
            for names, text in (
                (missing, f"it lacks {_some(missing, len(missing))}"),
                (unknown, f"it has unknown {_some(unknown, len(unknown))}"),
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
    return DTYPES[found.pop()] if len(found) == 1 else "float32"  # which holds both others


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


def _some(names: Collection[str], at_most: int = 4) -> str:
    shown = sorted(names)[:at_most]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
