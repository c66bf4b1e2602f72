"""The plan of a conversion: a plain value, complete before anything is written."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError as PydanticValidationError

from speculators import __version__
from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.reader import Checkpoint, Companion
from speculators.checkpoint.tensor import (
    FLOATS,
    PlannedTensor,
    TensorInfo,
    describe_shape,
    float_name,
)
from speculators.checkpoint.verifier import Verifier
from speculators.convert.rope_tables import check_rope_table
from speculators.errors import ConversionError, listed
from speculators.families.family import Derived, Family, Source, read_options
from speculators.families.recognition import Recognition, short_names
from speculators.families.research.forms import check_forms
from speculators.families.research.fused import split
from speculators.families.research.keys import SourceKeys
from speculators.families.research.rope_names import is_rope_table
from speculators.families.serving import unserved
from speculators.families.signature import Signature
from speculators.format.config import (
    ProposalMethod,
    SpeculatorConfig,
    SpeculatorsConfig,
    VerifierReference,
)
from speculators.format.problems import first_problem
from speculators.format.tensors import TensorSpec, compare, counts_shown, required_tensors

__all__ = [
    "ConversionPlan",
    "DraftPlan",
    "family_of",
    "plan_conversion",
    "plan_draft",
    "unchecked_head",
    "whole_config",
]


ROPE_TABLE = "it is computed from the config"

EXPORTED_ZEROS = "exported_zeros"
"""Key of an export's config.json: the tensors that its reader always wants, and the draft lacks."""


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What a conversion makes of a draft's tensors and config.

    Attributes:
        source: the checkpoint.
        family: the family that it belongs to.
        derived: the config of the converted draft, as far as it follows from the source.
        config: the same as a config, unchecked, with no name of the verifier.
        features: the features that the tensors show.
        dtype: the dtype of the weights, by torch's name; ``float32`` if they differ.
        tensors: name in the format → the source's tensor.
        made: name in the format → a tensor that follows from others.
        left_out: source name → why the tensor is left out.
        fits: the vocabulary and the hidden size of its verifiers.
        prefix: what was taken off the names of the source, beside ``model.``; may be empty.

    """

    source: Checkpoint
    family: Family
    derived: Derived
    config: SpeculatorConfig
    features: frozenset[str]
    dtype: str
    tensors: dict[str, TensorInfo]
    made: dict[str, PlannedTensor]
    left_out: dict[str, str]
    fits: tuple[int, int]
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion will write, and where each part comes from.

    Attributes:
        source: the checkpoint.
        family: the family that it belongs to.
        verifier: the model that it was trained for.
        config: the config.json to write.
        features: the features that the tensors show.
        tensors: name → the tensor to write, with the pieces of the source that it is made of.
        left_out: source name → why the tensor is left out.
        config_left_out: key of the source's config → why it is left out.
        discrepancies: clauses for the log: where config, tensors and reference disagree.
        rounded_to: the dtype that all weights are rounded to, a key of ``FLOATS``; ``None`` if each
            keeps its own.
        prefix: what was taken off the names of the source, beside ``model.``; may be empty.
        options: what the user said about the checkpoint: name of an option → its value.

    """

    source: Checkpoint
    family: Family
    verifier: Verifier
    config: SpeculatorConfig
    features: frozenset[str]
    tensors: dict[str, PlannedTensor]
    left_out: dict[str, str] = field(default_factory=dict)
    config_left_out: dict[str, str] = field(default_factory=dict)
    discrepancies: list[str] = field(default_factory=list)
    rounded_to: str | None = None
    prefix: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def companions(self) -> dict[str, Companion]:
        """The files beside the weights that are copied: their names are kept."""
        return {name: self.source.companions[name] for name in sorted(self.config.companions)}

    @property
    def replaced_head(self) -> TensorInfo | None:
        """The source's own head, if it is left out because the verifier's takes its place."""
        short = short_names(self.source.tensors).short
        names = (name for name in self.left_out if short[name] == "lm_head.weight")
        return next((self.source.tensors[name] for name in names), None)

    @property
    def nbytes(self) -> int:
        """The size of all tensors as written, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def unchecked_head(head: TensorInfo) -> str:
    """What to say of a source's own head that cannot be compared with the verifier's."""
    return (
        f"{head.name} of the draft was left out unchecked: whether it is the verifier's head, "
        "which takes its place, is not known"
    )


def plan_conversion(
    family: Family,
    checkpoint: Checkpoint,
    verifier: Verifier,
    *,
    asked: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
    rounded_to: str | None = None,
) -> ConversionPlan:
    """Plan the conversion of a checkpoint.

    Args:
        family: the family that it has to belong to.
        checkpoint: its config and table of tensors.
        verifier: the model that it was trained for.
        asked: the features that it must have. The tensors decide in any case.
        options: what the user says about it: name of an option of the family → its value.
        rounded_to: the dtype to round all weights to, a key of ``FLOATS``; each keeps its own if
            not given.

    Raises:
        ConversionError: if the tensors are not those of such a checkpoint, or contradict the
            config or what is asked for; the message names them.
        VerifierError: if the verifier has other sizes.

    """
    said = read_options(family.options, options or {})
    draft = plan_draft(family, checkpoint, verifier, said)
    for feature in asked:
        if feature not in draft.features:
            raise ConversionError(
                f"{checkpoint.name} has no {family.wanted(feature)}, which "
                f"{feature} asks for; omit it: features are detected from the tensors."
            )
    try:
        config = whole_config(
            draft, verifier.name, verifier.architectures, float_name(rounded_to) or draft.dtype
        )
    except PydanticValidationError as error:
        raise ConversionError(f"{checkpoint.config_file}, {first_problem(error)}.") from error
    vocabulary, hidden = config.verifier_sizes
    verifier.check_fits(hidden, vocabulary)
    discrepancies = draft.derived.discrepancies + _check_rope_tables(draft)
    if why := unserved(family, config, draft.features):
        discrepancies.append(f"vLLM does not serve it as it is converted: {why}")
    return ConversionPlan(
        source=checkpoint,
        family=family,
        verifier=verifier,
        config=config,
        features=draft.features,
        tensors={
            # A table of integers is never rounded.
            name: PlannedTensor.copy_of(info, rounded_to if info.dtype in FLOATS else None)
            for name, info in draft.tensors.items()
        }
        | draft.made,
        left_out=draft.left_out,
        config_left_out=draft.derived.left_out,
        discrepancies=discrepancies,
        rounded_to=rounded_to,
        prefix=draft.prefix,
        options=said,
    )


def whole_config(
    draft: DraftPlan, verifier: str | None, architectures: Collection[str], dtype: str
) -> SpeculatorConfig:
    """The config.json of a converted draft, with all defaults.

    Args:
        draft: the draft.
        verifier: the name of its verifier.
        architectures: the verifier's.
        dtype: of the weights as written, by torch's name.

    Raises:
        pydantic.ValidationError: if a value is not a possible one.

    """
    model_type = draft.derived.model_type or draft.family.name
    return draft.family.config.model_validate(
        {
            "architectures": draft.derived.architectures,
            "speculators_model_type": model_type,
            "speculators_version": __version__,
            "torch_dtype": dtype,
            "transformer_layer_config": draft.derived.layer.model_dump(),
            **draft.derived.keys,
            "speculators_config": {
                "algorithm": model_type,
                "proposal_methods": draft.derived.proposals or [ProposalMethod().model_dump()],
                "verifier": {"name_or_path": verifier, "architectures": list(architectures)},
            },
        }
    )


def plan_draft(
    family: Family,
    checkpoint: Checkpoint,
    verifier: Verifier | None = None,
    options: Mapping[str, Any] | None = None,
) -> DraftPlan:
    """Plan what becomes of a draft's tensors and config.

    Args:
        family: the family that it has to belong to.
        checkpoint: its config and table of tensors.
        verifier: the model that it was trained for; ``None`` if it is not known yet.
        options: what the user said about it, checked.

    Raises:
        ConversionError: if the tensors are not those of such a checkpoint, or contradict the
            config; the message names them.

    """
    check_forms(checkpoint.config, str(checkpoint.config_file))
    names = short_names(checkpoint.tensors)
    stored = _by_short_name(checkpoint, names.short)
    _check_head(family, checkpoint, stored)

    left_out = {
        info.name: why
        for name, info in stored.items()
        if (why := _reason_to_leave_out(family, name))
    }
    left_out |= _exported_zeros(checkpoint, read=verifier is not None)
    kept = {name: info for name, info in stored.items() if info.name not in left_out}
    keys = SourceKeys(checkpoint.config, str(checkpoint.config_file))
    kept = split(kept, keys.get("num_attention_heads"), keys.get("num_key_value_heads"))
    tensors = {family.names.in_format(name): info for name, info in kept.items()}
    features = family.features_of(tensors)
    source = Source(checkpoint, tensors, features, verifier, options or {}, names.short)
    completion = family.complete(source)
    tensors = {
        name: info
        for name, info in tensors.items()
        if name not in completion.made and info.name not in completion.left_out
    }
    whole = tensors | completion.made
    features = family.features_of(whole)
    required = required_tensors(family.tensors, features, counts_shown(family.tensors, whole))
    _check_names(family, checkpoint, whole, required, features)
    _check_dtypes(
        [info for info in stored.values() if info.name not in completion.left_out],
        tensors,
        required,
    )
    derived = family.derive(replace(source, tensors=tensors, features=features))
    derived.discrepancies[:0] = completion.discrepancies
    _check_finite({**derived.layer.model_dump(), **derived.keys}, checkpoint.config_file)
    architectures = list(verifier.architectures) if verifier else []
    reference = VerifierReference.model_construct(architectures=architectures)
    config = family.config.model_construct(
        **derived.keys,
        transformer_layer_config=derived.layer,
        speculators_config=SpeculatorsConfig.model_construct(verifier=reference),
    )
    tensors = {name: _one_row(it, required[name], config.sizes) for name, it in tensors.items()}
    _check_shapes(checkpoint, tensors, required, config.sizes)
    return DraftPlan(
        source=checkpoint,
        family=family,
        derived=derived,
        config=config,
        features=features,
        dtype=_dtype_of(tensors.values()),
        tensors=tensors,
        made=completion.made,
        left_out=left_out | completion.left_out,
        fits=config.verifier_sizes,
        prefix=names.prefix,
    )


def family_of(checkpoint: Checkpoint, found: Recognition, wanted: Family | None = None) -> Family:
    """The family that a checkpoint belongs to, of which it can be converted.

    Args:
        checkpoint: its config and table of tensors.
        found: what it was recognised as.
        wanted: the family that it has to belong to; any if not given.

    Raises:
        ConversionError: if it belongs to another or to none, or is quantized; the message says
            what it is.

    """
    if found.signature and found.signature.advice:
        raise ConversionError(
            f"{checkpoint.name} holds {found.signature.title} ({found.evidence[0]})"
            f"{f', not {wanted.noun}' if wanted else ''}; {found.signature.advice}."
            + _served(found.signature, checkpoint)
        )
    if not checkpoint.tensors:
        raise ConversionError(
            f"{checkpoint.name} has no tensors, which decide what it is; give a checkpoint with "
            "its weights."
        )
    if found.quantized:
        raise ConversionError(
            f"{checkpoint.name} holds quantized weights ({found.quantized[0]}), which are not "
            "converted; give the original, unquantized checkpoint."
            + _served(found.signature, checkpoint)
        )
    if found.signature is None or found.family is None:
        near = "; ".join(map(str, found.near)) or "it resembles no known kind"
        raise ConversionError(
            f"{checkpoint.name} is not a checkpoint of a known kind: it has "
            f"{listed(sorted(checkpoint.tensors))}; {near}."
        )
    if wanted and found.family is not wanted:
        raise ConversionError(
            f"{checkpoint.name} holds {found.signature.title} ({found.evidence[0]}); convert it "
            f"with: speculators convert {found.family.name}."
        )
    return found.family


def _served(signature: Signature | None, checkpoint: Checkpoint) -> str:
    """A sentence, after a space, on which engines serve it; empty for what is not a draft."""
    served = signature.served(checkpoint.config, checkpoint.tensors) if signature else None
    return f" {served[0].upper()}{served[1:]}." if served else ""


def _by_short_name(checkpoint: Checkpoint, short: Mapping[str, str]) -> dict[str, TensorInfo]:
    stored: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if short[name] in stored:
            raise ConversionError(
                f"{checkpoint.name} has {stored[short[name]].name} and {name}, which are the same "
                "tensor to the reference; remove the one that was not trained."
            )
        stored[short[name]] = info
    return stored


def _exported_zeros(checkpoint: Checkpoint, *, read: bool) -> dict[str, str]:
    """The tensors that an export added → why they are left out.

    Args:
        checkpoint: perhaps an export.
        read: whether to check that they are still zero.

    Raises:
        ConversionError: if one is not.

    """
    named = checkpoint.config.get(EXPORTED_ZEROS)
    added = [it for it in named if it in checkpoint.tensors] if isinstance(named, list) else []
    for name in added if read else ():
        info = checkpoint.tensors[name]
        if any(any(chunk) for chunk in contiguous_chunks(info)):
            raise ConversionError(
                f"{info.file}: {name} is not zero, but {checkpoint.config_file}, key "
                f"{EXPORTED_ZEROS}, says that an export added it; if it was trained since, remove "
                "that key."
            )
    return dict.fromkeys(added, "it is zero: an export added it for its reader")


def _check_head(family: Family, checkpoint: Checkpoint, stored: Mapping[str, TensorInfo]) -> None:
    """Check the shape of a head that is left out, since the verifier's takes its place."""
    head = stored.get("lm_head.weight")
    if head is None or _reason_to_leave_out(family, "lm_head.weight") is None:
        return
    keys = SourceKeys(checkpoint.config, str(checkpoint.config_file))
    vocabulary, hidden = keys.get("vocab_size"), keys.get("hidden_size")
    if not isinstance(vocabulary, int) or head.shape == (vocabulary, hidden):
        return
    shape = describe_shape(head.shape)
    if len(head.shape) == 2 and head.shape[1] == hidden and head.shape[0] < vocabulary:
        raise ConversionError(
            f"{head.file}: {head.name} {shape} has {head.shape[0]} of {vocabulary} rows: the draft "
            "has a frequency-trimmed vocabulary (as FR-Spec makes it), while in the format such "
            "drafts use the verifier's whole head; remove the head to draft with the whole "
            "vocabulary."
        )
    raise ConversionError(
        f"{head.file}: {head.name} has the shape {shape}, but with {checkpoint.config_file.name} a "
        f"head has ({vocabulary}, {hidden}); give the config that belongs to the tensors."
    )


def _check_rope_tables(draft: DraftPlan) -> list[str]:
    """Compare stored tables of RoPE with the derived config; clauses on what was not compared."""
    unchecked = []
    for name, why in draft.left_out.items():
        if why == ROPE_TABLE:
            reason = check_rope_table(
                draft.source.tensors[name], draft.derived.layer, str(draft.source.config_file)
            )
            if reason:
                unchecked.append(f"{name} was left out unchecked: {reason}")
    return unchecked


def _reason_to_leave_out(family: Family, name: str) -> str | None:
    """Why the tensor called ``name`` (without prefix) is left out; ``None`` if it is not."""
    if is_rope_table(name):
        return ROPE_TABLE
    return next((why for form, why in family.omissions.items() if re.fullmatch(form, name)), None)


def _one_row(info: TensorInfo, spec: TensorSpec, sizes: Mapping[str, int]) -> TensorInfo:
    """A tensor of one row with the axes that the table has, however many of size 1 are stored."""
    shape = spec.shape(sizes)
    same = [size for size in info.shape if size != 1] == [size for size in shape if size != 1]
    if "one" in spec.dimensions and same and info.strides is None:
        return replace(info, shape=shape)
    return info


def _check_names(
    family: Family,
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo | PlannedTensor],
    required: Mapping[str, TensorSpec],
    features: frozenset[str],
) -> None:
    difference = compare(tensors, required)
    missing = [family.names.in_research(name) for name in difference.missing]
    unknown = [tensors[name].label for name in difference.unknown]
    if unknown or missing:
        problems = [
            text
            for names, text in (
                (missing, f"it lacks {', '.join(sorted(missing))}"),
                (unknown, f"it has unknown {', '.join(sorted(unknown))}"),
            )
            if names
        ]
        shown = ", ".join(family.features[feature] for feature in sorted(features))
        # A part of a feature may be all that was trained, which the format cannot express.
        partial = all(required[name].feature for name in difference.missing)
        advice = (
            "missing tensors are not made up, so give the complete checkpoint"
            + (", or, if it never had these, serve it as it was published" if partial else "")
            if not unknown
            else "no tensor is dropped: remove what was not trained; else the architecture differs"
            if not missing
            else "no tensor is made up or dropped: a draft with these is a different architecture"
        )
        raise ConversionError(
            f"{checkpoint.name} does not have the tensors of {family.noun}"
            f"{f' with {shown}' if shown else ''}: {', and '.join(problems)}; {advice}."
        )


def _check_dtypes(
    stored: Collection[TensorInfo],
    tensors: Mapping[str, TensorInfo],
    required: Mapping[str, TensorSpec],
) -> None:
    expected = {
        tensors[name].name: spec.dtypes for name, spec in required.items() if name in tensors
    }
    for info in stored:
        if is_rope_table(info.name):
            continue
        dtypes = expected.get(info.name, tuple(FLOATS))
        if info.dtype not in dtypes:
            raise ConversionError(
                f"{info.file}: {info.name} has the type {info.dtype}, so its weights are quantized "
                f"or not a draft's, which are of one of the types {', '.join(dtypes)}."
            )


def _check_finite(value: Any, config_file: Path, path: str = "") -> None:
    """Refuse numbers that JSON cannot hold: they would be written as null."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_finite(inner, config_file, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_finite(inner, config_file, f"{path}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConversionError(
            f"{config_file}, key {path}: {value} is not a finite number; correct the config."
        )


def _dtype_of(tensors: Collection[TensorInfo]) -> str:
    found = {info.dtype for info in tensors} & FLOATS.keys()
    # float32 holds the values of all of them.
    return FLOATS[found.pop()].name if len(found) == 1 else "float32"


def _check_shapes(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    required: Mapping[str, TensorSpec],
    sizes: Mapping[str, int],
) -> None:
    for name, shape in compare(tensors, required, sizes).reshaped.items():
        info = tensors[name]
        raise ConversionError(
            f"{info.file}: {info.name} has the shape {describe_shape(info.shape)}, but with "
            f"{Path(checkpoint.config_file).name} it should have "
            f"{describe_shape(shape)}; give the config that belongs to the tensors."
        )
