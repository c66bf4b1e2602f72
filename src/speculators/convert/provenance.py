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
from speculators.errors import ValidationError
from speculators.format.conversion import (
    CONVERSION_FILE,
    ConversionRecord,
    FileRecord,
    RepositoryRecord,
    SourceRecord,
    parse_conversion,
)

__all__ = ["changed_source_files", "check_files", "read_record", "record_conversion"]


def record_conversion(
    plan: ConversionPlan,
    directory: Path,
    *,
    unchecked: list[str] | None,
    hashes: Mapping[Path, str],
    progress: Progress = silent,
) -> ConversionRecord:
    """Record what ``directory`` was made from.

    Args:
        plan: the plan of its conversion.
        directory: what was written; all files in it are recorded.
        unchecked: what its validation could not check; ``None`` if it was not validated, in which
            case no file is hashed.
        hashes: the SHA-256 of the files that were hashed as they were copied.
        progress: reports the bytes hashed.

    Raises:
        OSError: if a file cannot be read.

    """
    validated = unchecked is not None
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
            name=plan.source.name if plan.source.commit else str(Path(plan.source.name).resolve()),
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
        unchecked=unchecked or [],
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


def check_files(record: ConversionRecord, directory: Path, progress: Progress = silent) -> None:
    """Check that the files of a converted checkpoint are those that were written.

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
    if not record.validated:
        logger.warning(
            f"{directory} was converted without validation, so {CONVERSION_FILE} knows no hashes: "
            "of its files only the sizes were checked"
        )


def changed_source_files(
    record: ConversionRecord, source: Checkpoint, progress: Progress = silent
) -> list[str]:
    """The files of a source that the record of a conversion lacks, or has with other content."""
    paths = _source_files(source)
    known = [path for path in paths if path.name in record.source.files]
    new = [path.name for path in paths if path.name not in record.source.files]
    return new + _changed(record.source.files, known, progress)


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
    return sorted({source.config_file, *(info.file for info in source.tensors.values())})


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
