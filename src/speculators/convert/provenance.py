"""What a converted checkpoint was made from: writing its conversion.json, and checking against it.

A conversion that validates reads every byte anyway, and records the hashes of all files. One that
does not validate lets the kernel copy the bytes; hashing them would take longer than the copy, so
only sizes are recorded. For a source on the Hub, its commit is recorded in either case.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from loguru import logger

from speculators.checkpoint.digest import sha256_of_files
from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.identity import FileIdentity
from speculators.checkpoint.progress import Progress, silent
from speculators.checkpoint.reader import Checkpoint
from speculators.checkpoint.tensor import float_name
from speculators.convert.plan import ConversionPlan
from speculators.errors import ValidationError, listed
from speculators.families.converted import Converted
from speculators.format.conversion import (
    CONVERSION_FILE,
    ConversionRecord,
    FileRecord,
    RepositoryRecord,
    SourceRecord,
    parse_conversion,
)

__all__ = [
    "check_files",
    "check_record",
    "read_record",
    "record_conversion",
    "warn_of_another_source",
    "warn_of_other_weights",
]


def record_conversion(
    plan: ConversionPlan,
    directory: Path,
    *,
    validated: bool,
    unchecked: list[str],
    hashes: Mapping[Path, str],
    progress: Progress = silent,
) -> ConversionRecord:
    """Record what ``directory`` was made from.

    Args:
        plan: the plan of its conversion.
        directory: what was written; all files in it are recorded.
        validated: whether it was validated; if not, no file is hashed.
        unchecked: what could not be checked.
        hashes: the SHA-256 of the files that were hashed as they were copied.
        progress: reports the bytes hashed.

    Raises:
        OSError: if a file cannot be read.

    """
    sources, written = _source_files(plan.source), sorted(directory.iterdir())
    files = _describe(
        sources + written,
        hashed=validated,
        progress=progress,
        hashes=hashes,
        identities=plan.source.files,
    )
    return ConversionRecord(
        speculators_version=plan.config.speculators_version,
        source=SourceRecord(
            name=_source_name(plan.source),
            revision=plan.source.commit,
            files={path.name: files[path] for path in sources},
        ),
        verifier=RepositoryRecord(
            name=plan.verifier.name, revision=plan.verifier.repository.commit
        ),
        dtype=float_name(plan.rounded_to),
        options=plan.options,
        tensors={name: tensor.label for name, tensor in plan.tensors.items()},
        left_out=plan.left_out,
        config_left_out=plan.config_left_out,
        discrepancies=plan.discrepancies,
        validated=validated,
        unchecked=unchecked,
        files={path.name: files[path] for path in written},
    )


def read_record(directory: Path) -> ConversionRecord | None:
    """Read a directory's conversion.json; ``None`` if it has none.

    Raises:
        CheckpointError: if it is not a JSON object.
        FormatError: if it breaks the format.

    """
    path = directory / CONVERSION_FILE
    return parse_conversion(read_json(path), str(path)) if path.is_file() else None


def check_files(
    record: ConversionRecord, directory: Path, progress: Progress = silent
) -> list[str]:
    """Check that the files of a converted checkpoint are those that were written.

    Returns:
        Sentences on what the record leaves open.

    Raises:
        ValidationError: if one is missing or differs.

    """
    paths = [directory / name for name in record.files]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValidationError(f"{directory} lacks {', '.join(missing)}; convert again.")
    if changed := _changed(record.files, paths, progress):
        raise ValidationError(
            f"{directory / changed[0]} is not the file that was written, by {CONVERSION_FILE}: it "
            "was changed or is damaged; restore it, or convert again."
        )
    if record.validated:
        return []
    why = f"{directory} was converted without validation, so {CONVERSION_FILE} has no hashes"
    return [f"{why}: of its files only the sizes were checked."]


def check_record(record: ConversionRecord, written: Converted) -> list[str]:
    """Check that a record is that of a directory.

    Returns:
        Sentences on what the record leaves open.

    Raises:
        ValidationError: if it contradicts the directory's config or tensors.

    """
    directory, config = written.directory, written.config
    facts: list[tuple[str, object, object]] = [
        ("speculators_version", record.speculators_version, config.speculators_version),
        (
            "the verifier",
            record.verifier.name,
            str(config.speculators_config.verifier.name_or_path),
        ),
    ]
    if record.dtype is not None:
        facts.append(("the dtype", record.dtype, config.torch_dtype))
    if record.tensors:
        facts.append(("the tensors", sorted(record.tensors), sorted(written.tensors)))
    for what, recorded, found in facts:
        if recorded != found:
            shown = "" if isinstance(recorded, list) else f": {recorded!r} there, {found!r} here"
            raise ValidationError(
                f"{directory / CONVERSION_FILE} has another value of {what} than the "
                f"directory{shown}; it belongs to another conversion, so convert again."
            )
    files = {written.checkpoint.config_file, *(it.file for it in written.tensors.values())}
    unknown = sorted(path.name for path in files if path.name not in record.files)
    unhashed = [name for name, file in record.files.items() if not file.sha256]
    unhashed_sources = [name for name, file in record.source.files.items() if not file.sha256]
    gaps = (
        (
            unknown and f"the files {', '.join(unknown)}",
            "whether they are those that were written is not known",
        ),
        (
            record.validated and unhashed and f"a hash of {', '.join(unhashed)}",
            "only the size was checked",
        ),
        (not record.tensors and "the tensors", "what they were made of is not known"),
        (not record.source.files and "the files of the source", "it is known by its name only"),
        (
            record.validated and unhashed_sources and f"a hash of {', '.join(unhashed_sources)}",
            "the source is known by its size only",
        ),
    )
    return [
        f"{directory / CONVERSION_FILE} lacks {lacks}: {consequence}."
        for lacks, consequence in gaps
        if lacks
    ]


def warn_of_other_weights(written: Converted) -> None:
    """Tell of weights in the folder that are no part of the draft: vLLM loads them all the same."""
    own = {info.file.name for info in written.tensors.values()}
    others = sorted(
        path.name for path in written.directory.glob("*.safetensors") if path.name not in own
    )
    if others:
        logger.warning(
            f"{written.directory} also has {listed(others)}, which are no part of the draft, but "
            "vLLM loads every *.safetensors of a folder; remove what was not trained with it"
        )


def warn_of_another_source(
    record: ConversionRecord, planned: ConversionPlan, progress: Progress = silent
) -> None:
    """Warn if a source, or its verifier, is not the one that a record names."""
    source = _source_name(planned.source)
    if (source, planned.source.commit) != (record.source.name, record.source.revision):
        logger.warning(
            f"{_at(source, planned.source.commit)} is not what was converted, by "
            f"{CONVERSION_FILE}: that is {_at(record.source.name, record.source.revision)}"
        )
    commit = planned.verifier.repository.commit
    if commit is not None and commit != record.verifier.revision:
        logger.warning(
            f"The verifier {_at(planned.verifier.name, commit)} is not the one of the conversion, "
            f"by {CONVERSION_FILE}: that is "
            f"{_at(record.verifier.name, record.verifier.revision)}"
        )
    labels = {name: tensor.label for name, tensor in planned.tensors.items()}
    if record.tensors and labels != record.tensors:
        differing = [name for name in labels if labels[name] != record.tensors.get(name)]
        logger.warning(
            f"{CONVERSION_FILE} says that {', '.join(differing)} was made of other tensors than "
            f"{source} has for it, but these have the same values"
        )
    paths = _source_files(planned.source)
    known = [path for path in paths if path.name in record.source.files]
    new = [path.name for path in paths if path.name not in record.source.files]
    for name in new + _changed(record.source.files, known, progress):
        logger.warning(
            f"{name} of {source} is not the file that was converted, but gives the same draft"
        )


def _source_name(source: Checkpoint) -> str:
    return source.name if source.commit else str(Path(source.name).resolve())


def _at(name: str, commit: str | None) -> str:
    return f"{name} at {commit}" if commit else name


def _changed(
    records: dict[str, FileRecord], paths: Collection[Path], progress: Progress
) -> list[str]:
    """The names of the files that differ from their records; sizes are compared first."""
    sizes = _describe(paths, hashed=False, progress=progress)
    if other := [path.name for path in paths if sizes[path].bytes != records[path.name].bytes]:
        return other
    hashed = [path for path in paths if records[path.name].sha256]
    files = _describe(hashed, hashed=True, progress=progress)
    return [path.name for path in hashed if files[path].sha256 != records[path.name].sha256]


def _source_files(source: Checkpoint) -> list[Path]:
    return sorted(source.files)


def _describe(
    paths: Collection[Path],
    *,
    hashed: bool,
    progress: Progress,
    hashes: Mapping[Path, str] | None = None,
    identities: Mapping[Path, FileIdentity | None] | None = None,
) -> dict[Path, FileRecord]:
    """Sizes and, if asked for, hashes of files; known hashes are not computed again."""
    identities = identities or {}
    sizes = {
        path: identity.size if (identity := identities.get(path)) else path.stat().st_size
        for path in paths
    }
    known = dict(hashes or {})
    if hashed:
        left = [path for path in paths if path not in known]
        advance = progress("Hashing", sum(sizes[path] for path in left))
        known |= sha256_of_files(left, advance, identities)
    return {path: FileRecord(bytes=size, sha256=known.get(path)) for path, size in sizes.items()}
