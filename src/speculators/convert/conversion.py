"""Conversion: read, plan, write, validate, and only then move into place."""

import hashlib
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loguru import logger

from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.output.staging import check_output, staged_directory
from speculators.checkpoint.output.stamp import README, write_stamped
from speculators.checkpoint.output.writer import copy_file, write_safetensors_file
from speculators.checkpoint.paths import local_path
from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.reader import Checkpoint, find_companions, read_checkpoint
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.tensor import stored_float
from speculators.checkpoint.verifier import Verifier, open_verifier
from speculators.convert.imports import import_ahead
from speculators.convert.plan import (
    ConversionPlan,
    family_of,
    plan_conversion,
    unchecked_head,
)
from speculators.convert.proof import Proof
from speculators.convert.provenance import (
    check_files,
    check_record,
    read_record,
    record_conversion,
    warn_of_another_source,
    warn_of_other_weights,
)
from speculators.convert.replan import plan_of_itself, verifier_of
from speculators.errors import ConversionError, OutputError, VerifierError
from speculators.families.card import model_card
from speculators.families.converted import open_converted
from speculators.families.family import Family
from speculators.families.recognition import recognise
from speculators.format.conversion import CONVERSION_FILE, ConversionRecord

__all__ = ["convert", "plan", "validate"]


def convert(
    source: str | Path,
    output: str | Path,
    base_model: str | Path,
    *,
    family: Family | None = None,
    asked: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
    validate: bool = True,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dtype: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Convert a checkpoint of any family into a directory in the speculators format.

    The directory appears only when it is complete and, unless ``validate`` is off, validated.
    Until then, and if anything fails, ``output`` is left as it was.

    Args:
        source: a directory, a file of weights beside a config.json, or a Hugging Face id.
        output: the directory to create: config.json, model.safetensors, conversion.json and a model
            card, README.md.
        base_model: the verifier that the draft was trained for: a directory or a Hugging
            Face id. Its config is read, and its weights only for validation.
        family: the family that the checkpoint has to belong to; found out if not given.
        asked: the features that the checkpoint must have.
        options: what is said about the checkpoint where its files leave it open: name of an option
            of the family → its value.
        validate: prove the result before it appears, see ``validate_conversion``.
        cache_dir: where downloads are kept; the Hub client's default cache if not given.
        revision: a branch, tag or commit of ``source`` on the Hub.
        overwrite: replace ``output`` if a converted checkpoint is there.
        dtype: round the weights to ``"float16"``, ``"bfloat16"`` or ``"float32"`` (or, for short,
            ``"fp16"``, ``"bf16"``, ``"fp32"``); each keeps its own dtype if not given.
        progress: reports the bytes written, compared and hashed.

    Returns:
        The path of the directory.

    Raises:
        CheckpointError: the source is missing, damaged, or not safe to read.
        ConversionError: it is not such a checkpoint, lacks what is asked for, or has values
            that ``dtype`` cannot hold.
        VerifierError: the verifier cannot be read or does not fit.
        HubError: a file cannot be fetched from the Hub.
        OutputError: the output exists or cannot be written.
        ValidationError: the result does not hold or compute what the source does.

    """
    kind = f"{family.name.capitalize()} checkpoint" if family else "checkpoint"
    logger.info(f"Converting {kind}: {source}")
    output = local_path(output, OutputError)
    _refuse_same_directory(source, output)
    _refuse_to_replace_what_is_read({"input": source, "verifier": base_model}, output)
    check_output(output, overwrite=overwrite)
    planned = plan(
        source,
        base_model,
        family=family,
        asked=asked,
        options=options,
        cache_dir=cache_dir,
        revision=revision,
        dtype=dtype,
    )
    if validate:
        import_ahead(planned.family)
    with staged_directory(output, overwrite=overwrite) as staging:
        config = planned.config.model_dump_json(indent=2, exclude_none=True)
        (staging / "config.json").write_text(config + "\n", encoding="utf-8")
        weights = staging / "model.safetensors"
        hashes = write_safetensors_file(
            weights, planned.tensors, progress=progress, hashed=validate
        )
        for companion in planned.companions.values():
            copy_file(companion.file, companion.identity, staging / companion.file.name)
        if validate:
            from speculators.convert.validation import validate_conversion

            digest = hashlib.sha256()
            unchecked = validate_conversion(
                planned, open_converted(staging), progress=progress, digest=digest
            )
            hashes[weights] = digest.hexdigest()
        else:
            head = planned.replaced_head
            unchecked = [] if head is None else [unchecked_head(head)]
            for sentence in unchecked:
                logger.warning(sentence)
        record = record_conversion(
            planned,
            staging,
            validated=validate,
            unchecked=unchecked,
            hashes=hashes,
            progress=progress,
        )
        (staging / CONVERSION_FILE).write_text(
            record.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        _write_card(planned, record, staging, output)
    logger.success(f"Saved to: {output}")
    return output


def _write_card(
    planned: ConversionPlan, record: ConversionRecord, directory: Path, replaced: Path
) -> None:
    """Write the model card, which nothing else depends on: anybody may edit it.

    One that somebody wrote or edited is taken over from the directory that is replaced.
    """
    card = model_card(
        None,
        planned.family,
        planned.config,
        parameters=sum(tensor.elements for tensor in planned.tensors.values()),
        features=planned.features,
        record=record,
    )
    if (replaced / README).is_file():
        shutil.copyfile(replaced / README, directory / README)
    if not write_stamped(directory / README, card):
        logger.warning(f"{replaced / README} was written or edited by somebody, and is kept")


def validate(
    directory: str | Path,
    source: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> Proof:
    """Check a converted checkpoint again, at any time; nothing is written.

    Its files must be those that its conversion.json records, and the model must load. On seeded
    random inputs, its output must be finite, causal, and equal to a plain evaluation of its
    tensors, and its logits must be those of the verifier's head. A warning names what cannot be
    checked because the verifier or conversion.json is missing.

    Args:
        directory: the converted checkpoint, or a Hugging Face id of one.
        source: what it was converted from, a directory or a Hugging Face id. The conversion
            is planned again, and everything that ``convert`` proves is proven again.
        cache_dir: where downloads are kept; the Hub client's default cache if not given.
        revision: a branch, tag or commit of ``source`` on the Hub.
        progress: reports the bytes compared and hashed.

    Returns:
        What was proven, and what was left open.

    Raises:
        CheckpointError, HubError: the directory or the source cannot be read or fetched.
        ConversionError: the source is not such a checkpoint.
        VerifierError: the verifier is a draft, or does not fit the source.
        FormatError: the directory is not a converted checkpoint.
        ValidationError: it is not what was written, or does not hold or compute what its
            source does.

    """
    logger.info(f"Checking converted checkpoint: {directory}")
    hub = HubAccess(cache_dir)
    written = open_converted(directory, hub)
    import_ahead(written.family)
    written.repository.file(CONVERSION_FILE)  # which on the Hub is not fetched with the draft
    record = read_record(written.directory)
    if record is None:
        gaps = [f"{directory} has no {CONVERSION_FILE}: what was written is not known."]
    else:
        gaps = check_files(record, written.directory, progress) + check_record(record, written)
    warn_of_other_weights(written)
    for sentence in gaps:
        logger.warning(sentence)
    verifier = verifier_of(written)

    from speculators.convert.validation import validate_conversion, validate_model

    if source is None:
        proven = [] if gaps else ["has the files that the conversion wrote"]
        for sentence in record.unchecked if record else ():
            gaps.append(f"The conversion could not check this: {sentence}")
            logger.warning(gaps[-1])
        unchecked = validate_model(plan_of_itself(written, verifier), written)
    else:
        planned = _plan(
            *_read(source, hub, revision, written.family),
            verifier,
            dtype=record.dtype if record else None,
            options=record.options if record else None,
        )
        unchecked = validate_conversion(planned, written, progress=progress)
        if record is not None:
            warn_of_another_source(record, planned, progress)
        # What a record leaves open, the source tells.
        proven, gaps = [f"has the config and the tensors that {source} gives"], []
    proof = Proof([*proven, "computes what its tensors say"], gaps + unchecked)
    logger.success(f"Valid: {directory}{proof}")
    return proof


def plan(
    source: str | Path,
    base_model: str | Path,
    *,
    family: Family | None = None,
    asked: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
) -> ConversionPlan:
    """Plan what ``convert`` would do, without writing anything; see there for the arguments."""
    hub = HubAccess(cache_dir)
    planned = _plan(
        *_read(source, hub, revision, family),
        open_verifier(base_model, hub),
        asked=asked,
        options=options,
        dtype=dtype,
    )
    _refuse_draft_as_its_own_verifier(source, base_model)
    return planned


def _read(
    source: str | Path, hub: HubAccess, revision: str | None, family: Family | None
) -> tuple[Family, Checkpoint]:
    """Read a source, and the files beside its weights that its family may have."""
    repository = open_repository(source, hub, revision=revision, one_file=True)
    checkpoint = read_checkpoint(repository)
    logger.info(f"Loaded {len(checkpoint.tensors)} weights")
    family = family_of(checkpoint, recognise(checkpoint.config, checkpoint.tensors), family)
    companions = find_companions(repository, family.companions)
    return family, replace(checkpoint, companions=companions)


def _plan(
    family: Family,
    checkpoint: Checkpoint,
    verifier: Verifier,
    *,
    dtype: str | None,
    asked: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
) -> ConversionPlan:
    planned = plan_conversion(
        family,
        checkpoint,
        verifier,
        asked=asked,
        options=options,
        rounded_to=_stored_dtype(dtype),
    )
    _log(planned)
    return planned


def _stored_dtype(dtype: str | None) -> str | None:
    try:
        return None if dtype is None else stored_float(dtype)
    except ValueError as error:
        raise ConversionError(f"The dtype {error}.") from error


def _log(planned: ConversionPlan) -> None:
    detected = {flag.feature: flag.feature in planned.features for flag in planned.family.flags} | {
        "layer": planned.config.architectures[-1],
        "dtype": planned.config.torch_dtype,
    }
    logger.debug(f"Detected: {', '.join(f'{key}={value}' for key, value in detected.items())}")
    if planned.prefix:
        logger.info(f"The tensors' names begin with {planned.prefix}, which is taken off")
    for name, tensor in planned.tensors.items():
        if name != tensor.label:
            logger.debug(f"Remapped: {tensor.label} -> {name}")
    for name, why in planned.left_out.items():
        logger.debug(f"Left out: {name}: {why}")
    for key, why in planned.config_left_out.items():
        logger.debug(f"Left out of config.json: {key}: {why}")
    for clause in planned.discrepancies:
        logger.warning(f"{planned.source.name}: {clause}")


def _refuse_to_replace_what_is_read(read: dict[str, str | Path], output: Path) -> None:
    for what, path in read.items():
        source = local_path(path)
        if source.exists() and output.is_dir() and output.resolve() in source.resolve().parents:
            raise OutputError(f"{output} holds the {what} {source}; choose another output.")


def _refuse_same_directory(source: str | Path, output: Path) -> None:
    if _are_same(local_path(source), output):
        raise OutputError(f"{output} is the input too; choose another output.")


def _refuse_draft_as_its_own_verifier(input_path: str | Path, base_model: str | Path) -> None:
    source, verifier = local_path(input_path), local_path(base_model)
    if source == verifier or _are_same(source, verifier):
        raise VerifierError(
            f"{base_model} is given as the draft and as its verifier; give the language model that "
            "the draft was trained for as BASE_MODEL."
        )


def _are_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
