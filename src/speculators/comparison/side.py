"""One of two checkpoints that are compared: what it holds, by the format's names and config.

A research checkpoint is planned as for a conversion, so that layouts that mean the same look the
same. What no plan can be made of keeps its own names and config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speculators.checkpoint.files.torch_file import read_torch_entries
from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.reader import Checkpoint, find_companions, read_checkpoint
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo
from speculators.checkpoint.verifier import Verifier
from speculators.convert.plan import DraftPlan, family_of, plan_draft, whole_config
from speculators.convert.provenance import read_record
from speculators.convert.replan import unavailable, verifier_of
from speculators.errors import CheckpointError, ConversionError, FormatError, VerifierError
from speculators.families.converted import Converted, check_converted
from speculators.families.family import Family
from speculators.families.foreign import CONVERTED
from speculators.families.recognition import Recognition, recognise, short_names
from speculators.families.registry import family_named
from speculators.format.config import SpeculatorConfig

__all__ = ["Side", "open_sides"]

ABOUT_THE_FILE = frozenset(
    {"architectures", "speculators_version", "torch_dtype", "dtype", "speculators_config"}
)
"""Keys of a converted draft's config that say who wrote it, and how to speculate."""


@dataclass(slots=True)
class Side:
    """One of the two.

    Attributes:
        checkpoint: as it is stored.
        title: what it is, with an article.
        family: its family; ``None`` if it belongs to none.
        tensors: name in the format → the tensor; by its own names if no plan can be made. Those of
            files beside the weights have the file's name, and their own if they have one.
        config: key of the format's config → value, with dots between levels; likewise.
        left_out: stored name → why a conversion leaves the tensor out.
        converted: the draft, if it is in the format.
        plan: otherwise, what a conversion would make of it; ``None`` if that is not possible.
        options: what was said about it when it was converted, or the other one was.
        verifier: what it was planned with; of one that was not needed, only sizes are known.
        notes: clauses on what is not known.

    """

    checkpoint: Checkpoint
    title: str
    family: Family | None
    tensors: dict[str, PlannedTensor]
    config: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    converted: Converted | None = None
    plan: DraftPlan | None = None
    options: dict[str, Any] = field(default_factory=dict)
    verifier: Verifier | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def planned(self) -> bool:
        """Whether names and config are the format's."""
        return self.converted is not None or self.plan is not None


def open_sides(
    sources: tuple[str | Path, str | Path], hub: HubAccess = DEFAULT_ACCESS
) -> tuple[Side, Side]:
    """Open two checkpoints; what one of them says about the draft holds for the other.

    Args:
        sources: directories, files of weights in them, or Hub ids.
        hub: the cache and the token.

    Raises:
        CheckpointError, HubError: if one cannot be read or fetched.
        FormatError: if one is said to be in the format, and is not.

    """
    found = [_read(source, hub) for source in sources]
    known = [
        _converted(checkpoint)
        if recognised.signature is CONVERTED and _family_of(checkpoint, recognised)
        else None
        for checkpoint, recognised in found
    ]
    in_format = next(filter(None, known), None)
    one, other = (
        side or _research(checkpoint, recognised, in_format)
        for side, (checkpoint, recognised) in zip(known, found, strict=True)
    )
    for side in (one, other):
        side.tensors |= _companion_tensors(side.checkpoint)
    return one, other


def _read(source: str | Path, hub: HubAccess) -> tuple[Checkpoint, Recognition]:
    """Read a checkpoint, with the files beside its weights, and say what it is."""
    repository = open_repository(source, hub, one_file=True)
    checkpoint = read_checkpoint(repository)
    found = recognise(checkpoint.config, checkpoint.tensors)
    family = _family_of(checkpoint, found)
    companions = find_companions(repository, family.companions if family else ())
    return replace(checkpoint, companions=companions), found


def _family_of(checkpoint: Checkpoint, found: Recognition) -> Family | None:
    return found.family or family_named(checkpoint.config.get("speculators_model_type"))


def _companion_tensors(checkpoint: Checkpoint) -> dict[str, PlannedTensor]:
    """The tensors of the files beside the weights."""
    return {
        f"{name} {key}".rstrip(): PlannedTensor.copy_of(info)
        for name, companion in checkpoint.companions.items()
        for key, info in read_torch_entries(companion.file).items()
        if isinstance(info, TensorInfo)
    }


def _converted(checkpoint: Checkpoint) -> Side:
    converted = check_converted(checkpoint)
    notes = []
    try:
        record = read_record(converted.directory)
    except (CheckpointError, FormatError) as error:
        record, notes = None, [f"{checkpoint.name}: {str(error).removesuffix('.')}"]
    return Side(
        checkpoint,
        f"{converted.family.signature.title} in the speculators format",
        converted.family,
        {name: PlannedTensor.copy_of(info) for name, info in converted.tensors.items()},
        _meaning(converted.config),
        converted=converted,
        options=record.options if record else {},
        notes=notes,
    )


def _research(checkpoint: Checkpoint, found: Recognition, other: Side | None) -> Side:
    side = Side(
        checkpoint,
        found.signature.title if found.signature else "a checkpoint of no known kind",
        found.family,
        {name: PlannedTensor.copy_of(info) for name, info in checkpoint.tensors.items()},
        _flat(checkpoint.config),
    )
    if found.family is None:
        return side
    try:
        side.plan = _choose_plan(side, family_of(checkpoint, found), other)
    except ConversionError as error:
        side.notes.append(f"{checkpoint.name} could not be converted: {str(error).rstrip('.')}")
        short = short_names(checkpoint.tensors).short
        names = {name: found.family.names.in_format(short[name]) for name in side.tensors}
        side.tensors = {names[name]: tensor for name, tensor in side.tensors.items()}
        return side
    side.tensors = {
        **{name: PlannedTensor.copy_of(info) for name, info in side.plan.tensors.items()},
        **side.plan.made,
    }
    side.config = _planned_config(side.plan)
    side.left_out = side.plan.left_out
    return side


def _choose_plan(side: Side, family: Family, other: Side | None) -> DraftPlan:
    """Plan a conversion; where that leaves questions open, with what the other side knows.

    A question has few answers. What was said about the other side is tried first, then nothing, and
    then each answer; the first plan is taken that gives the other's config, or else the first one.

    Raises:
        ConversionError: if the checkpoint cannot be converted.

    """
    plan = plan_draft(family, side.checkpoint)
    vocabulary, hidden = plan.fits
    no_verifier = VerifierError("No verifier is known.")
    side.verifier = unavailable("unknown", hidden, vocabulary, no_verifier)
    if not plan.made and not plan.derived.discrepancies:
        return plan
    answers: list[dict[str, Any]] = [{}]
    if other is not None and other.converted is not None and other.family is family:
        side.verifier = verifier_of(other.converted)
        each = [
            {it.name: value}
            for it in family.options
            for value in ([True, False] if not it.metavar else it.metavar.split("|"))
            if "|" in it.metavar or not it.metavar
        ]
        answers = [other.options, {}, *(other.options | it for it in each)]
    chosen: tuple[DraftPlan, dict[str, Any]] | None = None
    why = ""
    for options in answers:
        try:
            plan_with = plan_draft(family, side.checkpoint, side.verifier, options)
        except ConversionError as error:
            why = why or str(error).rstrip(".")
            continue
        agrees = other is not None and _planned_config(plan_with) == other.config
        if chosen is None or agrees:
            chosen = plan_with, options
        if agrees:
            break
    if chosen is None:
        side.notes.append(why)
        # What follows from others is not computed without a verifier, and cannot be compared.
        return replace(plan, made={})
    plan, side.options = chosen
    if side.options and not _says(side, family, plan):
        said = ", ".join(f"{name} {value}" for name, value in side.options.items())
        side.notes.append(f"{side.checkpoint.name} is read with {said}, since that was left open")
    return plan


def _says(side: Side, family: Family, plan: DraftPlan) -> bool:
    """Whether a checkpoint tells by itself what a plan takes it for."""
    try:
        alone = plan_draft(family, side.checkpoint, side.verifier)
    except ConversionError:
        return False
    return _planned_config(alone) == _planned_config(plan)


def _planned_config(plan: DraftPlan) -> dict[str, Any]:
    return _meaning(whole_config(plan, None, (), plan.dtype))


def _meaning(config: SpeculatorConfig) -> dict[str, Any]:
    """The keys that the format has, but for those about the file.

    One that is false, or says that all layers have full attention, counts as missing.
    """
    keys = type(config).model_fields.keys() - ABOUT_THE_FILE
    flat = _flat(config.model_dump(mode="json", include=set(keys)))
    return {
        key: value
        for key, value in flat.items()
        if value is not False
        and not (key.endswith(".layer_types") and {*value} == {"full_attention"})
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config with dots between its levels; a null value counts as a missing key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
