"""What a checkpoint is and what can be done with it, judged by its config and tensor table."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.hub.headers import headers_only
from speculators.checkpoint.reader import Checkpoint, read_config, read_tensors
from speculators.checkpoint.repository import Repository, open_repository
from speculators.convert.eagle import LAYERNORM_MAPPINGS
from speculators.convert.plan import plan_draft
from speculators.errors import CheckpointError, ConversionError, FormatError, NoWeightsError
from speculators.families.converted import check_converted
from speculators.families.recognition import recognise, strip_prefix
from speculators.format.conversion import CONVERSION_FILE, RepositoryRecord, parse_conversion
from speculators.format.layouts import current_name
from speculators.format.tensors import FEATURES, TENSORS
from speculators.inspection.findings import (
    ConversionFinding,
    Finding,
    NearFinding,
    TensorFinding,
    VerifierFinding,
)

__all__ = ["inspect_checkpoint"]

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

UNUSUAL = ("fusion_bias", "attention_bias", "layernorms")
"""The features that are worth naming in the title."""

HASS = re.compile(r"(?<![a-z])hass(?![a-z])", re.IGNORECASE)


def inspect_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Finding:
    """Say what a checkpoint is, on what evidence, and what can be done with it.

    Only its config.json, its conversion.json and the headers of its weight files are read; from the
    Hub, no more than that is fetched.

    Args:
        source: a directory, a file of weights in one, or a Hugging Face id.
        revision: a branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; the Hub client's default cache if not given.

    Raises:
        CheckpointError: if config.json or a header is damaged, or there is no config.json.
        HubError: if a file cannot be fetched from the Hub.

    """
    repository = open_repository(source, revision=revision, cache_dir=cache_dir, one_file=True)
    with headers_only(repository) as light:
        return _inspect(light)


def _inspect(repository: Repository) -> Finding:
    config, config_file = read_config(repository)
    notes: list[str] = []
    try:
        tensors = read_tensors(repository)
    except NoWeightsError as error:
        tensors = {}
        notes.append(f"{error} What it is, is judged by its config.json alone.")
    if repository.commit:  # name files as on the Hub, not as in the cache
        home = Path(repository.name)
        tensors = {n: replace(info, file=home / info.file.name) for n, info in tensors.items()}
        config_file = home / config_file.name
    checkpoint = Checkpoint(repository.name, config, config_file, tensors)
    found = recognise(config, tensors)
    kind = found.family.kind if found.family else "unknown"
    details = DETAILS.get(kind, _details)(checkpoint)
    record = repository.file(CONVERSION_FILE) if kind == "speculators" else None

    title = found.family.name if found.family else "of no kind that is known"
    unusual = [FEATURES[it] for it in UNUSUAL if details.features and details.features[it]]
    sizes = {key: details.sizes[key] for key in SIZES if isinstance(details.sizes.get(key), int)}
    return Finding(
        name=checkpoint.name,
        kind=kind,
        title=title + (f" with {' and '.join(unusual)}" if unusual else ""),
        evidence=list(found.evidence),
        quantized=list(found.quantized),
        near=[
            NearFinding(
                kind=near.family.kind,
                difference=str(near),
                found=near.found,
                missing=list(near.missing),
                excluded=near.excluded,
            )
            for near in found.near
        ],
        converted_from=_source_of(record, notes) if record else None,
        notes=notes + details.notes,
        layout=details.layout,
        features=details.features,
        sizes=sizes,
        parameters=sum(info.elements for info in tensors.values()),
        bytes=sum(info.nbytes for info in tensors.values()),
        dtypes=dict(Counter(info.dtype for info in tensors.values())),
        tensors=[
            TensorFinding(
                name=name,
                dtype=info.dtype,
                shape=list(info.shape),
                bytes=info.nbytes,
                file=info.file.name,
                target=details.targets.get(name),
                left_out=details.left_out.get(name),
            )
            for name, info in tensors.items()
        ],
        verifier=_verifier(kind, sizes, details.verifier),
        conversion=details.conversion,
    )


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
        verifier: the verifier that a converted draft names.
        notes: what cannot be determined, and what is wrong.

    """

    sizes: Mapping[str, Any]
    conversion: ConversionFinding
    features: dict[str, list[str]] | None = None
    targets: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    layout: Literal["current", "0.1.0 to 0.3.0"] | None = None
    verifier: str | None = None
    notes: list[str] = field(default_factory=list)


def _details(checkpoint: Checkpoint) -> Details:
    """Details of a checkpoint that is neither converted nor convertible."""
    nested = checkpoint.config.get("text_config")
    sizes = nested if isinstance(nested, dict) and nested else checkpoint.config
    return Details(sizes, ConversionFinding(possible=False, why_not=_why_not(checkpoint)))


def _details_of_draft(checkpoint: Checkpoint) -> Details:
    name = PurePath(checkpoint.name).name
    notes = [
        "Tensors cannot tell EAGLE-1, EAGLE-2 and HASS apart: EAGLE-2 grows another tree with "
        "EAGLE-1's weights, and HASS trains the same module in another way"
        + (f"; the name {name} suggests HASS." if HASS.search(name) else ".")
    ]
    if not checkpoint.tensors:
        why_not = f"{checkpoint.name} has no weights that could be read, and they decide."
        return Details(
            checkpoint.config, ConversionFinding(possible=False, why_not=why_not), notes=notes
        )
    short = {name: strip_prefix(name) for name in checkpoint.tensors}
    features = _features({name: LAYERNORM_MAPPINGS.get(it, it) for name, it in short.items()})
    try:
        plan = plan_draft(checkpoint, LAYERNORM_MAPPINGS)
    except ConversionError as error:
        conversion = ConversionFinding(possible=False, why_not=str(error))
        return Details(checkpoint.config, conversion, features, notes=notes)
    if "embedding" not in plan.features:
        notes.append("It has no embedding of its own: the verifier's is used.")
    return Details(
        plan.layer.model_dump(),
        ConversionFinding(
            possible=True,
            command=f"speculators convert eagle {shlex.quote(checkpoint.name)} OUTPUT BASE_MODEL",
            layer_config=plan.layer.model_dump(exclude_none=True),
            config_left_out=plan.config_left_out,
            odd=plan.odd,
        ),
        features,
        targets={info.name: target for target, info in plan.tensors.items()},
        left_out=plan.left_out,
        notes=notes,
    )


def _details_of_converted(checkpoint: Checkpoint) -> Details:
    config = checkpoint.config
    layer = config.get("transformer_layer_config")
    sizes = layer if isinstance(layer, dict) else {}
    if config["speculators_model_type"] != "eagle":
        conversion = ConversionFinding(
            possible=False,
            why_not=f"{checkpoint.name} is converted already, but to the type "
            f"{config['speculators_model_type']}, which this version does not read.",
        )
        return Details(sizes, conversion)
    targets = {name: current_name(name) for name in checkpoint.tensors}
    verifier, notes = None, []
    try:
        converted = check_converted(checkpoint).config
    except FormatError as error:
        notes.append(f"It cannot be used: {error}")
    else:
        sizes = converted.transformer_layer_config.model_dump()
        verifier = converted.speculators_config.verifier.name_or_path
    return Details(
        sizes,
        ConversionFinding(possible=False, why_not=_why_not(checkpoint)),
        _features(targets) if targets else None,
        targets,
        layout=_layout(targets) if targets else None,
        verifier=verifier,
        notes=notes,
    )


DETAILS: dict[str, Callable[[Checkpoint], Details]] = {
    "eagle": _details_of_draft,
    "speculators": _details_of_converted,
}
"""Kind → what finds its details; ``_details`` for all others."""


def _why_not(checkpoint: Checkpoint) -> str:
    """Why a checkpoint cannot be converted."""
    try:
        plan_draft(checkpoint, LAYERNORM_MAPPINGS)
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


def _layout(targets: Mapping[str, str]) -> Literal["current", "0.1.0 to 0.3.0"]:
    """Which versions' names tensors have, given stored → current names."""
    return "current" if all(k == v for k, v in targets.items()) else "0.1.0 to 0.3.0"


def _features(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Feature → stored names of the tensors that show it, given stored → current names."""
    stored = {name: where for where, name in names.items()}
    features: dict[str, list[str]] = {feature: [] for feature in FEATURES}
    for spec in TENSORS:
        if spec.feature and spec.name in stored:
            features[spec.feature].append(stored[spec.name])
    return features


def _verifier(kind: str, sizes: Mapping[str, int], name: str | None) -> VerifierFinding | None:
    """What a draft fits, or what fits a model; ``None`` if unknown."""
    if kind not in {"eagle", "speculators", "language-model"}:
        return None
    try:
        return VerifierFinding(
            hidden_size=sizes["hidden_size"], vocab_size=sizes["vocab_size"], name=name
        )
    except KeyError:
        return None
