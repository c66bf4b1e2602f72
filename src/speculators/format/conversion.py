"""The conversion.json of a converted checkpoint: what it was made of, as pydantic models."""

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints
from pydantic import ValidationError as PydanticValidationError

from speculators.errors import FormatError
from speculators.format.problems import first_problem

__all__ = [
    "CONVERSION_FILE",
    "ConversionRecord",
    "FileRecord",
    "RepositoryRecord",
    "SourceRecord",
    "parse_conversion",
]

CONVERSION_FILE = "conversion.json"

FileName = Annotated[str, StringConstraints(pattern=r"^[^/]+$")]


class FileRecord(BaseModel):
    """A file, identified by its content."""

    bytes: int = Field(ge=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """``None`` if the conversion did not read it: see ``ConversionRecord.validated``."""


class RepositoryRecord(BaseModel):
    """A directory or a Hub repository, as it was when it was read."""

    name: str
    """The directory's absolute path, or the Hub id."""
    revision: str | None = None
    """The commit on the Hub; ``None`` for a directory."""


class SourceRecord(RepositoryRecord):
    """The checkpoint that was converted."""

    files: dict[FileName, FileRecord]
    """Its config.json and the files that hold its tensors."""


class ConversionRecord(BaseModel):
    """The whole conversion.json; keys that this version does not know are kept."""

    model_config = ConfigDict(extra="allow")

    speculators_version: str
    """The version of speculators that made the conversion."""
    source: SourceRecord
    verifier: RepositoryRecord
    dtype: str | None = None
    """What the tensors were rounded to, by torch's name; ``None`` if each kept its dtype."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What was said about the source on the command line, where its files leave it open: name of
    an option → its value."""
    tensors: dict[str, str]
    """Name here → what it was made of: a name in the source, with its rows if only some were
    taken, or several of them."""
    left_out: dict[str, str]
    """Name in the source → why the tensor was left out."""
    config_left_out: dict[str, str]
    """Key of the source's config.json → why it was left out."""
    discrepancies: list[str] = Field(validation_alias=AliasChoices("discrepancies", "notes"))
    """Where the source's config, its tensors and the reference disagreed. Versions before 1.0
    called it ``notes``."""
    validated: bool
    """Whether the conversion validated its result. Only then are hashes recorded: without
    validation, the kernel copies the bytes, and no file is hashed."""
    unchecked: list[str]
    """What the validation could not check, and why."""
    files: dict[FileName, FileRecord]
    """The files that were written, except conversion.json itself."""


def parse_conversion(record: dict[str, Any], where: str) -> ConversionRecord:
    """Check a conversion.json against the format.

    Args:
        record: the parsed JSON.
        where: the file, for the message.

    Raises:
        FormatError: if it is not in the format; the message names the first wrong key.

    """
    try:
        return ConversionRecord.model_validate(record)
    except PydanticValidationError as error:
        raise FormatError(f"{where}, {first_problem(error)}; convert again.") from error
