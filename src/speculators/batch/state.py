"""Whether a conversion is done already, judged by what is at its output."""

import re
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from speculators.batch.manifest import Conversion
from speculators.checkpoint.digest import sha256_of_file
from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.output.staging import check_output
from speculators.checkpoint.repository import open_repository
from speculators.convert.provenance import read_record
from speculators.errors import HubError, OutputError, SpeculatorsError
from speculators.families.converted import parse_config
from speculators.format.conversion import (
    CONVERSION_FILE,
    ConversionRecord,
    FileRecord,
    RepositoryRecord,
)

__all__ = ["is_done"]

COMMIT = re.compile(r"[0-9a-f]{40}")


def is_done(conversion: Conversion, hub: HubAccess = DEFAULT_ACCESS) -> bool:
    """Whether the output is what the conversion would make.

    It is if its conversion.json records the same input, verifier and dtype, it satisfies the flags,
    its files have the recorded sizes, and the input is unchanged: on this machine, none of its
    files has changed; on the Hub, the revision is still the recorded commit. If the Hub cannot be
    reached, the latter is assumed, with a warning.

    Raises:
        OutputError: if something else is at the output and may not be replaced.

    """
    output = conversion.output
    if not output.is_dir() or not any(output.iterdir()):
        check_output(output, overwrite=False)
        return False
    difference = next(_differences(conversion, hub), None)
    if difference is None:
        return True
    try:
        check_output(output, overwrite=conversion.overwrite)
    except OutputError as error:
        raise OutputError(
            f"{output} exists, and is not what this entry makes: {difference}; choose another "
            "output, or set overwrite if it is a converted checkpoint."
        ) from error
    logger.info(f"Replacing {output}: {difference}")
    return False


def _differences(conversion: Conversion, hub: HubAccess) -> Iterator[str]:
    """Say how the output differs from what the conversion would make, as clauses."""
    output = conversion.output
    if not (output / "config.json").is_file():
        yield "it is not a converted checkpoint"
        return
    try:
        record = read_record(output)
        family, checked = parse_config(read_json(output / "config.json"), str(output))
    except SpeculatorsError:
        yield f"its config.json or {CONVERSION_FILE} cannot be read"
        return
    if record is None:
        yield f"it has no {CONVERSION_FILE}"
        return
    differs = {
        f"its input was {record.source.name}": _name(conversion.input) != record.source.name,
        f"its verifier was {record.verifier.name}": (
            _name(conversion.base_model) != record.verifier.name
        ),
        f"its dtype was {'rounded to ' + record.dtype if record.dtype else 'kept'}": (
            conversion.dtype != record.dtype
        ),
        "it was not validated": conversion.validated and not record.validated,
        f"it is {family.noun}": conversion.family not in {None, family.name},
        f"its options were {record.options or 'none'}": conversion.options != record.options,
    }
    yield from (clause for clause, different in differs.items() if different)
    for feature in conversion.asked:
        if feature not in checked.features:
            yield f"it has no {family.wanted(feature)}"
    for name, file in record.files.items():
        if not _has_size(output / name, file):
            yield f"{name} is missing or has another size"
    if record.source.revision is None:
        yield from _changes_here(record, output)
    else:
        yield from _changes_on_hub(conversion, record.source, hub)


def _changes_here(record: ConversionRecord, output: Path) -> Iterator[str]:
    """Say which files of an input on this machine have changed since the conversion."""
    converted_at = (output / CONVERSION_FILE).stat().st_mtime_ns
    source = Path(record.source.name)
    directory = source.parent if source.is_file() else source
    for name, file in record.source.files.items():
        path = directory / name
        if not _has_size(path, file):
            yield f"{path} has changed since"
        elif path.stat().st_mtime_ns > converted_at and file.sha256 != sha256_of_file(path):
            yield f"{path} is newer"


def _changes_on_hub(
    conversion: Conversion, source: RepositoryRecord, hub: HubAccess
) -> Iterator[str]:
    """Say if the revision of an input on the Hub is another commit now."""
    commit = conversion.revision or ""
    if not COMMIT.fullmatch(commit):
        repository = open_repository(conversion.input, hub, revision=conversion.revision)
        try:
            repository.holds("config.json")
        except HubError as error:
            logger.warning(f"{error} {conversion.output} is assumed to be up to date.")
            return
        commit = repository.commit or ""
    if commit != source.revision:
        yield f"{source.name} was at the commit {source.revision}, and is at {commit} now"


def _name(source: str) -> str:
    """What conversion.json calls a directory or Hub id."""
    path = Path(source)
    return str(path.resolve()) if path.is_absolute() else source


def _has_size(path: Path, file: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes
