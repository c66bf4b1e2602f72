"""The manifest of a batch: a file with a list of conversions."""

import json
from collections import Counter
from collections.abc import Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    create_model,
    model_validator,
)
from pydantic import ValidationError as PydanticValidationError

from speculators.checkpoint.paths import meant_path
from speculators.checkpoint.repository import looks_like_a_path
from speculators.checkpoint.tensor import float_name, stored_float
from speculators.errors import ManifestError, did_you_mean
from speculators.families.family import Family, Option
from speculators.families.registry import flags_of, options_of
from speculators.format.problems import first_problem

__all__ = ["Conversion", "read_manifest"]


def _read_dtype(name: str) -> str | None:
    return float_name(stored_float(name))


class Entry(BaseModel):
    """One entry: what `speculators convert` takes on the command line.

    The flags and options of the family are further keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = Field(min_length=1)
    """The draft: a directory, or a Hugging Face id."""
    output: Path
    """The directory to make."""
    base_model: str = Field(min_length=1)
    """The verifier that the draft was trained for: a directory, or a Hugging Face id."""
    revision: str | None = None
    """A branch, tag or commit of the input on the Hub."""
    validated: bool = Field(default=True, alias="validate")
    """Prove that the result has the draft's tensors and computes what they compute."""
    dtype: Annotated[str, AfterValidator(_read_dtype)] | None = None
    """Round the tensors to this type; each keeps its own if not given."""
    overwrite: bool = False
    """Replace what is at the output if it is another converted checkpoint."""
    push_to_hub: str | None = None
    """Publish the output at this id of the Hub."""
    private: bool = False
    """Keep the repository that is published private."""
    report: Path | None = None
    """What `speculators evaluate` wrote, for the model card that is published."""

    @model_validator(mode="after")
    def _check_publishing(self) -> "Entry":
        if self.push_to_hub is None and (self.private or self.report):
            raise ValueError("private and report only work with push_to_hub")
        if self.push_to_hub is not None and not self.validated:
            raise ValueError("what is published has to be validated")
        return self


class Conversion(Entry):
    """An entry, and what it converts."""

    family: str | None
    """The name of the family that the input has to belong to; any if not given."""
    asked: tuple[str, ...] = ()
    """The features that the input must have."""
    options: dict[str, Any] = {}
    """What is said about the input where its files leave it open."""

    def relative_to(self, directory: Path) -> "Conversion":
        """Return a copy whose relative paths are resolved against ``directory``."""
        return self.model_copy(
            update={
                "input": _located(self.input, directory),
                "output": _absolute(self.output, directory),
                "base_model": _located(self.base_model, directory),
                "report": self.report and _absolute(self.report, directory),
            }
        )


def read_manifest(file: Path, family: Family | None = None) -> list[Conversion]:
    """Read a manifest: JSON if it is named ``*.json``, else YAML.

    Its conversions are of one family, or of any if none is given.
    Relative paths in it are relative to its directory. An input or verifier that neither exists
    there nor looks like a path is a Hugging Face id.

    Raises:
        ManifestError: if it cannot be read, is not a list of conversions, or two of them conflict;
            the message names the entry, counted from 1.

    """
    entries = _parse(file)
    if not isinstance(entries, list) or not entries:
        raise ManifestError(
            f"{file} has to be a list of conversions, each with input, output and base_model."
        )
    flags: dict[str, Any] = {flag.feature: (bool, False) for flag in flags_of(family)}
    options: dict[str, Any] = {
        option.name: (Annotated[Any, BeforeValidator(partial(_read, option))], None)
        for option in options_of(family)
    }
    model = create_model("EntryOfFamily", __base__=Entry, **flags, **options)
    try:
        checked: list[Entry] = TypeAdapter(list[model]).validate_python(  # type: ignore[valid-type]
            entries
        )
    except PydanticValidationError as error:
        keys = [field.alias or name for name, field in model.model_fields.items()]
        raise ManifestError(f"{file}, {_problem(error, keys)}.") from error
    conversions = [
        Conversion(
            family=family.name if family else None,
            asked=tuple(flag for flag in flags if getattr(entry, flag)),
            options={
                name: value for name in options if (value := getattr(entry, name)) is not None
            },
            **entry.model_dump(by_alias=True, exclude={*flags, *options}),
        ).relative_to(file.parent.absolute())
        for entry in checked
    ]
    for problem in _collisions(conversions):
        raise ManifestError(f"{file}, {problem}.")
    return conversions


def _read(option: Option, value: Any) -> Any:
    return None if value is None else option.read(value)


def _parse(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        meant = "" if file.exists() else meant_path(file)
        raise ManifestError(f"{file} cannot be read: {reason}{meant}.") from error
    try:
        if file.suffix == ".json":
            return json.loads(text, object_pairs_hook=_mapping)
        return _parse_yaml(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ManifestError(f"{file} cannot be understood: {reason}.") from error


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            _refuse_twice([key.value for key, _ in node.value if isinstance(key.value, str)])
            built: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return built

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or error}") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs])
    return dict(pairs)


def _refuse_twice(keys: list[str]) -> None:
    for key, count in Counter(keys).items():
        if count > 1:
            raise ValueError(f"the key {key!r} is there twice in one entry")


def _problem(error: PydanticValidationError, keys: list[str]) -> str:
    """Say what is wrong with the first invalid entry."""
    problem = first_problem(error)
    index, _, key = problem.key.partition(".")
    entry = f"entry {int(index) + 1}"
    match problem.type:
        case "extra_forbidden":
            meant = did_you_mean(key, keys)
            return f"{entry} has the unknown key {key!r}{meant}; the keys are {', '.join(keys)}"
        case "missing":
            return f"{entry} has no {key}"
        case "model_type":
            return f"{entry} is not a mapping of keys to values; the keys are {', '.join(keys)}"
        case _:
            return (
                f"{entry}, key {key}: {problem.message}" if key else f"{entry}: {problem.message}"
            )


def _collisions(conversions: list[Conversion]) -> Iterator[str]:
    """Say which entries write or publish where another one does, or write what one reads."""
    publishers: dict[str, int] = {}
    writers: dict[Path, int] = {}
    for number, conversion in enumerate(conversions, start=1):
        output = conversion.output.resolve()
        if output in writers:
            yield f"entries {writers[output]} and {number} have the same output {output}"
        writers[output] = number
        if repo := conversion.push_to_hub:
            if repo in publishers:
                yield f"entries {publishers[repo]} and {number} are both published at {repo}"
            publishers[repo] = number
    for number, conversion in enumerate(conversions, start=1):
        output = conversion.output.resolve()
        for parent in writers.keys() & set(output.parents):
            yield f"entry {number} has its output {output} within that of entry {writers[parent]}"
        for read in (conversion.input, conversion.base_model):
            if not Path(read).is_absolute():
                continue  # a Hugging Face id
            path = Path(read).resolve()
            for written in writers.keys() & {path, *path.parents}:
                yield (
                    f"entry {number} reads {read}, which entry {writers[written]} writes; "
                    "make two batches of them"
                )


def _absolute(path: Path, directory: Path) -> Path:
    """Make a path absolute, without ``..``; a symlink at its end is not followed."""
    whole = directory / path.expanduser()
    return whole.resolve() if whole.name == ".." else whole.parent.resolve() / whole.name


def _located(source: str, directory: Path) -> str:
    """Make a path absolute; leave a Hugging Face id as it is."""
    path = _absolute(Path(source), directory)
    return str(path) if path.exists() or looks_like_a_path(source) else source
