"""What ``convert``, ``validate`` and ``batch`` print with --json.

The JSON schemas in docs/ are made from these models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from speculators.convert.plan import ConversionPlan
from speculators.convert.provenance import read_record
from speculators.ending import Ending
from speculators.families.converted import open_converted

if TYPE_CHECKING:
    from speculators.batch.run import Outcome

__all__ = ["BatchResult", "ConvertResult", "Result", "ValidateResult"]


class Result(Ending):
    """What a command prints that has done something."""

    schema_version: Literal[1] = 1
    """1; a higher number means that a key has changed its meaning or is gone."""


class ValidateResult(Result):
    """What `speculators validate --json` prints: ``ok`` says whether the checkpoint is sound."""

    output: str
    """The converted checkpoint."""
    source: str | None
    """What it was compared with, if that was given."""
    proven: list[str] = Field(default_factory=list)
    """What was proven, in clauses that follow its name."""
    left_open: list[str] = Field(default_factory=list)
    """What could not be checked, and why; without this, ``ok`` means that everything was."""


class ConvertResult(Result):
    """What `speculators convert --json` prints, also with --dry-run."""

    output: str
    """The directory to create."""
    written: bool = False
    """Whether it was created: not on a dry run, and not after an error."""
    family: str | None = None
    """The family of the draft; ``None``, as for all that follows, if an error came first."""
    features: list[str] = Field(default_factory=list)
    """The features that its tensors show."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The new config.json."""
    tensors: dict[str, str] = Field(default_factory=dict)
    """Name of a tensor written → what it is made of."""
    bytes: int | None = None
    """The size of these tensors."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Name of a tensor of the source → why it is left out."""
    config_left_out: dict[str, str] = Field(default_factory=dict)
    """Key of the source's config.json → why it is left out."""
    discrepancies: list[str] = Field(default_factory=list)
    """Where the source's config, its tensors and the reference disagree."""
    validated: bool = False
    """Whether the result was validated."""
    unchecked: list[str] = Field(default_factory=list)
    """What validation could not check, and why."""
    url: str | None = None
    """The commit on the Hub, if the result was published."""

    def tell_plan(self, plan: ConversionPlan) -> None:
        """Tell what would be written."""
        self.family, self.features = plan.family.name, sorted(plan.features)
        self.config = plan.config.model_dump(exclude_none=True)
        self.tensors = {name: tensor.label for name, tensor in plan.tensors.items()}
        self.bytes = plan.nbytes
        self.left_out, self.config_left_out = plan.left_out, plan.config_left_out
        self.discrepancies = plan.discrepancies

    def tell_output(self, directory: Path) -> None:
        """Tell what was written into ``output``."""
        converted, record = open_converted(directory), read_record(directory)
        assert record is not None, "every conversion writes one"
        self.written = True
        self.family, self.features = converted.family.name, sorted(converted.features)
        self.config = converted.checkpoint.config
        self.tensors = record.tensors
        self.bytes = sum(info.nbytes for info in converted.tensors.values())
        self.left_out, self.config_left_out = record.left_out, record.config_left_out
        self.discrepancies = record.discrepancies
        self.validated, self.unchecked = record.validated, record.unchecked


class EntryResult(BaseModel):
    """What became of one entry of a manifest."""

    input: str
    """The draft."""
    output: str
    """The directory to create."""
    base_model: str
    """The verifier."""
    outcome: str
    """``to do``, ``done before``, ``converted``, ``failed`` or ``stopped``."""
    seconds: float
    """How long it took."""
    error: str | None
    """The sentence that says why it failed."""
    url: str | None
    """The commit on the Hub, if the output was published."""


class BatchResult(Result):
    """What `speculators batch --json` prints: ``ok`` says that no entry failed."""

    manifest: str
    """The file with the list of conversions."""
    entries: list[EntryResult] = Field(default_factory=list)
    """One for each of them, in their order; empty if the manifest is wrong."""

    def tell(self, outcomes: "Sequence[Outcome]") -> None:
        """Tell what became of the entries."""
        self.entries = [
            EntryResult(
                input=it.conversion.input,
                output=str(it.conversion.output),
                base_model=it.conversion.base_model,
                outcome=it.state.value,
                seconds=round(it.seconds, 3),
                error=it.error,
                url=it.url,
            )
            for it in outcomes
        ]
