"""What a checkpoint is and what can be done with it, judged by its config and tensor table."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.headers import headers_only
from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.reader import Checkpoint, Companion, read_config, read_tensors
from speculators.checkpoint.repository import LocalDirectory, Repository, open_repository
from speculators.checkpoint.verifier import language_model_config
from speculators.convert.plan import family_of, plan_draft
from speculators.errors import (
    CheckpointError,
    ConversionError,
    FormatError,
    NativeLayoutError,
    NoWeightsError,
    SpeculatorsError,
    sentence,
)
from speculators.families.converted import Converted, check_converted
from speculators.families.family import Family
from speculators.families.foreign import CONVERTED, LANGUAGE_MODEL
from speculators.families.recognition import Recognition, recognise, short_names
from speculators.families.registry import family_named
from speculators.families.research.fused import unfused
from speculators.families.serving import Judgement, judge, judge_published, obstacle
from speculators.families.signature import Serving, Signature
from speculators.families.target import Depth
from speculators.format.conversion import CONVERSION_FILE, RepositoryRecord, parse_conversion
from speculators.format.tensors import counts_shown, features_shown
from speculators.inspection.findings import (
    ConversionFinding,
    Finding,
    NearFinding,
    RefusalFinding,
    ServingFinding,
    TensorFinding,
    VerifierFinding,
)
from speculators.inspection.mtp import mtp_finding
from speculators.mtp.find import why_unknown
from speculators.mtp.journal import half_done

__all__ = ["inspect_checkpoint", "unreadable"]

SIZES = (
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""The sizes that are reported, by their keys in config.json."""

BY_KIND = "The engines are those that serve its kind: more of it could not be read."


def inspect_checkpoint(
    source: str | Path,
    hub: HubAccess = DEFAULT_ACCESS,
    *,
    revision: str | None = None,
) -> Finding:
    """Say what a checkpoint is, on what evidence, and what can be done with it.

    Only its config.json, its conversion.json and the headers of its weight files are read; from the
    Hub, no more than that is fetched.

    Args:
        source: a directory, a file of weights in one, or a Hugging Face id.
        hub: the cache and the token.
        revision: a branch, tag or commit on the Hub.

    Raises:
        CheckpointError: if config.json or a header is damaged, or there is no config.json.
        HubError: if a file cannot be fetched from the Hub.

    """
    repository = open_repository(source, hub, revision=revision, one_file=True)
    with headers_only(repository) as light:
        return _inspect(light)


def _inspect(repository: Repository) -> Finding:
    checkpoint, notes = _read(repository)
    config, tensors = checkpoint.config, checkpoint.tensors
    found = recognise(config, tensors)
    is_converted = found.signature is CONVERTED
    family = family_named(config.get("speculators_model_type")) if is_converted else found.family
    if family is None:
        details = _details(checkpoint, found)
    else:
        beside = checkpoint.config_file.parent
        companions = {
            it: Companion(beside / it) for it in family.companions if repository.holds(it)
        }
        checkpoint = replace(checkpoint, companions=companions)
        of_family = _details_of_converted if is_converted else _details_of_draft
        details = of_family(checkpoint, family, found)
    record = repository.file(CONVERSION_FILE) if is_converted else None
    notes += _remarks(repository, checkpoint, family, found.signature)
    sizes = {key: details.sizes[key] for key in SIZES if isinstance(details.sizes.get(key), int)}
    return Finding(
        name=checkpoint.name,
        kind=found.signature.kind if found.signature else "unknown",
        family=family.name if family else None,
        title=_title(found.signature, family, details.features or {}),
        evidence=list(found.evidence),
        quantized=list(found.quantized),
        near=_near(found),
        converted_from=_source_of(record, notes) if record else None,
        notes=notes + details.notes,
        layout=details.layout,
        features=details.features,
        facts=details.facts,
        serving=_serving(found.signature, family, details.judgement, checkpoint),
        not_serving=_not_serving(found.signature, details.judgement, checkpoint),
        exports=details.exports,
        sizes=sizes,
        parameters=sum(info.elements for info in tensors.values()),
        bytes=sum(info.nbytes for info in tensors.values()),
        dtypes=dict(Counter(info.dtype for info in tensors.values())),
        tensors=_tensors(checkpoint, details),
        verifier=_verifier(sizes, details)
        if family is not None or found.signature is LANGUAGE_MODEL or is_converted
        else None,
        mtp=None if family else mtp_finding(config, tensors),
        conversion=details.conversion,
    )


def _read(repository: Repository) -> tuple[Checkpoint, list[str]]:
    """A checkpoint, of whose weights only headers are read, and notes on what could not be read."""
    config, config_file = read_config(repository)
    notes = []
    try:
        tensors = read_tensors(repository)
    except NoWeightsError as error:
        tensors = {}
        notes.append(f"{error} It is judged by its config.json alone.")
    if repository.commit:  # name files as on the Hub, not as in the cache
        home = Path(repository.name)
        tensors = {n: replace(info, file=home / info.file.name) for n, info in tensors.items()}
        config_file = home / config_file.name
    return Checkpoint(repository, config, config_file, tensors), notes


def _title(
    signature: Signature | None, family: Family | None, features: Mapping[str, list[str]]
) -> str:
    """What a checkpoint is, with the features that not every draft has."""
    if family is None:
        return signature.title if signature else "a checkpoint of no known kind"
    title = family.signature.title + " in the speculators format" * (signature is CONVERTED)
    unusual = [family.features[it] for it in family.unusual if features.get(it)]
    return title + (f" with {' and '.join(unusual)}" if unusual else "")


def _remarks(
    repository: Repository,
    checkpoint: Checkpoint,
    family: Family | None,
    signature: Signature | None,
) -> list[str]:
    """Notes on what lies beside a checkpoint, and on its kind."""
    notes = []
    if family is not None and repository.commit is None:
        notes += [
            f"{name} {what}."
            for name in sorted(repository.names())
            for pattern, what in family.beside.items()
            if re.fullmatch(pattern, name)
        ]
    if isinstance(repository, LocalDirectory) and (why := half_done(repository.path)):
        notes.append(f"It {why}.")
    if family is None and (why := why_unknown(checkpoint.config, checkpoint.tensors)):
        notes.append(f"It {why}.")
    if signature and (remark := signature.remark(checkpoint.tensors)):
        notes.append(remark)
    return notes


def _near(found: Recognition) -> list[NearFinding]:
    """The kinds that an unknown checkpoint resembles."""
    return [
        NearFinding(
            kind=near.signature.kind,
            difference=str(near),
            found=near.found,
            missing=list(near.missing),
            excluded=near.excluded,
        )
        for near in found.near
    ]


def unreadable(source: str, error: SpeculatorsError) -> Finding:
    """What is known of a checkpoint that cannot be read: why."""
    why = sentence(error)
    return Finding(
        name=source,
        kind="unknown",
        title="a checkpoint that cannot be read",
        evidence=[],
        quantized=[],
        near=[],
        notes=[why],
        sizes={},
        parameters=0,
        bytes=0,
        dtypes={},
        tensors=[],
        conversion=ConversionFinding(possible=False, why_not=why),
    )


def _serving(
    signature: Signature | None,
    family: Family | None,
    judgement: Judgement | None,
    checkpoint: Checkpoint,
) -> list[ServingFinding] | None:
    """The engines that serve a draft, or at least drafts of its kind."""
    if judgement is not None:
        return [_finding_of(it.serving, it.export) for it in judgement.ways]
    kind = family.signature if family else signature
    if kind is None or kind.serving is None:
        return None
    config, names = checkpoint.config, checkpoint.tensors
    return [_finding_of(it) for it in kind.serving if not it.obstacle(config, names)]


def _finding_of(it: Serving, export: str | None = None) -> ServingFinding:
    return ServingFinding(
        engine=it.engine,
        option=it.option,
        until=it.until or None,
        note=it.note or None,
        export=export,
    )


def _not_serving(
    signature: Signature | None, judgement: Judgement | None, checkpoint: Checkpoint
) -> list[RefusalFinding]:
    """The engines that do not serve a draft, of those that serve drafts of its kind."""
    if judgement is not None:
        return [
            RefusalFinding(engine=it.engine, note=it.note or None, export=it.export, why=it.why)
            for it in judgement.refusals
        ]
    obstacles = {
        it.engine: it.obstacle(checkpoint.config, checkpoint.tensors)
        for it in (signature.serving if signature else None) or ()
    }
    return [
        RefusalFinding(engine=engine, note=None, export=None, why=f"it {why}")
        for engine, why in obstacles.items()
        if why
    ]


@dataclass(frozen=True, slots=True)
class Details:
    """What is reported about a checkpoint beyond its kind.

    Attributes:
        sizes: a mapping with the keys of ``SIZES``, among others.
        conversion: see ``ConversionFinding``.
        features: see ``Finding``.
        targets: stored name → name in the format.
        left_out: stored name → why a conversion leaves the tensor out.
        layout: which version's names a converted draft's tensors have.
        facts: see ``Finding``.
        exports: likewise.
        judgement: which engines serve a draft of a family; ``None`` if that cannot be found out.
        fits: the vocabulary and the hidden size of a draft's verifiers, if they are not its own.
        verifier: the verifier that a converted draft names.
        notes: what cannot be determined, and what is wrong.

    """

    sizes: Mapping[str, Any]
    conversion: ConversionFinding
    features: dict[str, list[str]] | None = None
    targets: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    layout: Literal["current", "0.1.0 to 0.3.0"] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    exports: list[str] | None = None
    judgement: Judgement | None = None
    fits: tuple[int, int] | None = None
    verifier: str | None = None
    notes: list[str] = field(default_factory=list)


def _details(checkpoint: Checkpoint, found: Recognition) -> Details:
    """Details of a checkpoint of no family."""
    model_type = checkpoint.config.get("speculators_model_type")
    if model_type is not None:
        layer = checkpoint.config.get("transformer_layer_config")
        why_not = (
            f"{checkpoint.name} is converted already, but to the type {model_type}, which this "
            "version does not read."
        )
        return Details(
            layer if isinstance(layer, dict) else {},
            ConversionFinding(possible=False, why_not=why_not),
        )
    sizes = dict(language_model_config(checkpoint.config))
    return Details(sizes, ConversionFinding(possible=False, why_not=_why_not(checkpoint, found)))


def _details_of_draft(checkpoint: Checkpoint, family: Family, found: Recognition) -> Details:
    notes = [family.ambiguity(checkpoint.name)] if family.ambiguity else []
    if not checkpoint.tensors:
        why_not = f"{checkpoint.name} has no weights that can be read, and they decide."
        return Details(
            checkpoint.config, ConversionFinding(possible=False, why_not=why_not), notes=notes
        )
    short = short_names(checkpoint.tensors).short
    features = _features(
        family,
        {
            part: name
            for name, it in short.items()
            for part in map(family.names.in_format, unfused(it))
        },
    )
    try:
        plan = plan_draft(family_of(checkpoint, found), checkpoint)
    except NativeLayoutError as error:
        conversion = ConversionFinding(possible=False, why_not=str(error))
        judgement = judge_published(family, error.served_by)
        return Details(checkpoint.config, conversion, features, judgement=judgement, notes=notes)
    except ConversionError as error:
        conversion = ConversionFinding(possible=False, why_not=str(error))
        notes.append(BY_KIND)
        return Details(checkpoint.config, conversion, features, notes=notes)
    targets: dict[str, str] = {}
    for target, info in plan.tensors.items():  # a fused tensor becomes several
        targets[info.name] = ", ".join(filter(None, (targets.get(info.name), target)))
    if plan.prefix:
        notes.append(f"The tensors' names begin with {plan.prefix}, which is taken off.")
    if "embedding" in set(family.borrows) - plan.features:
        notes.append("It has no embedding of its own: the verifier's is used.")
    return Details(
        plan.derived.layer.model_dump(),
        ConversionFinding(
            possible=True,
            command=f"speculators convert {family.name} {shlex.quote(checkpoint.name)} "
            "OUTPUT BASE_MODEL",
            layer_config=plan.derived.layer.model_dump(exclude_none=True),
            config_left_out=plan.derived.left_out,
            discrepancies=plan.derived.discrepancies,
        ),
        features,
        targets=targets,
        left_out=plan.left_out,
        facts=plan.derived.facts,
        judgement=judge(family, plan.config, plan.features, lambda: plan.derived.supposed_depth),
        fits=plan.fits,
        notes=notes,
    )


def _details_of_converted(checkpoint: Checkpoint, family: Family, found: Recognition) -> Details:
    layer = checkpoint.config.get("transformer_layer_config")
    sizes = layer if isinstance(layer, dict) else {}
    targets = {name: family.names.current(name) for name in checkpoint.tensors}
    verifier, exports, judgement, notes = None, None, None, []
    facts: dict[str, str] = {}
    fits = None
    try:
        converted = check_converted(checkpoint)
        config = converted.config
    except FormatError as error:
        notes += [f"It cannot be used: {error}", BY_KIND]
    else:
        sizes = config.transformer_layer_config.model_dump()
        verifier = config.speculators_config.verifier.name_or_path
        facts, fits = family.facts(config), config.verifier_sizes
        depth = _depth(converted)
        judgement = judge(family, config, converted.features, depth)
        exports = [
            name
            for name, target in family.targets.items()
            if obstacle(family, config, converted.features, target, depth) is None
        ]
    return Details(
        sizes,
        ConversionFinding(possible=False, why_not=_why_not(checkpoint, found)),
        _features(family, {target: name for name, target in targets.items()}) if targets else None,
        targets,
        layout=_layout(targets) if targets else None,
        facts=facts,
        exports=exports,
        judgement=judgement,
        fits=fits,
        verifier=verifier,
        notes=notes,
    )


def _depth(converted: Converted) -> Depth:
    """How to find the number of the verifier's layers, if it is on this machine."""
    named = converted.config.speculators_config.verifier.name_or_path
    if named is None or not Path(named).is_dir():
        return lambda: None
    return cache(converted.verifier_layers)


def _why_not(checkpoint: Checkpoint, found: Recognition) -> str:
    """Why a checkpoint cannot be converted."""
    try:
        family_of(checkpoint, found)
    except ConversionError as error:
        return str(error)
    raise AssertionError(f"{checkpoint.name} can be converted")


def _source_of(record: Path, notes: list[str]) -> RepositoryRecord | None:
    """The source that a conversion.json records."""
    try:
        source = parse_conversion(read_json(record), record.name).source
    except (CheckpointError, FormatError) as error:
        notes.append(f"Where it comes from is not known: {error}")
        return None
    return RepositoryRecord(name=source.name, revision=source.revision)


def _tensors(checkpoint: Checkpoint, details: Details) -> list[TensorFinding]:
    """What is known of each tensor."""
    return [
        TensorFinding(
            name=name,
            dtype=info.dtype,
            shape=list(info.shape),
            bytes=info.nbytes,
            file=info.file.name,
            target=details.targets.get(name),
            left_out=details.left_out.get(name),
        )
        for name, info in checkpoint.tensors.items()
    ]


def _layout(targets: Mapping[str, str]) -> Literal["current", "0.1.0 to 0.3.0"]:
    """Which versions' names tensors have, given stored → current names."""
    return "current" if all(k == v for k, v in targets.items()) else "0.1.0 to 0.3.0"


def _features(family: Family, stored: Mapping[str, str]) -> dict[str, list[str]]:
    """Feature → stored names of the tensors that show it, given current → stored names."""
    shown = features_shown(family.tensors, stored, counts_shown(family.tensors, stored))
    return {
        feature: [stored[name] for name in shown.get(feature, ())] for feature in family.features
    }


def _verifier(sizes: Mapping[str, int], details: Details) -> VerifierFinding | None:
    """What a draft fits, or what fits a model; ``None`` if unknown."""
    try:
        vocabulary, hidden = details.fits or (sizes["vocab_size"], sizes["hidden_size"])
        return VerifierFinding(hidden_size=hidden, vocab_size=vocabulary, name=details.verifier)
    except KeyError:
        return None
