"""What ``speculators inspect --json`` prints, as pydantic models; docs/inspect.md explains it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from speculators.ending import Ending
from speculators.format.conversion import RepositoryRecord

__all__ = [
    "ConversionFinding",
    "Finding",
    "MtpFinding",
    "NearFinding",
    "RefusalFinding",
    "ServingFinding",
    "TensorFinding",
    "VerifierFinding",
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TensorFinding(_Part):
    """One tensor of the checkpoint."""

    name: str
    dtype: str
    """As safetensors calls it: F16, BF16, ..."""
    shape: list[int]
    bytes: int
    file: str
    """The file of the checkpoint that holds it."""
    target: str | None = None
    """What it is called in the speculators format; null if it is not converted."""
    left_out: str | None = None
    """Why a conversion leaves it out."""


class NearFinding(_Part):
    """A known kind that an unknown checkpoint resembles."""

    kind: str
    difference: str
    """How this checkpoint differs from it, in words."""
    found: dict[str, str]
    """Tensors of that kind that are there → the names that they have there."""
    missing: list[str]
    """Tensors that every checkpoint of that kind has, and this one lacks."""
    excluded: str | None
    """A tensor that this checkpoint has, and none of that kind has."""


class VerifierFinding(_Part):
    """The models that a draft fits, or the drafts that a model fits: those of the same sizes."""

    hidden_size: int
    vocab_size: int
    name: str | None = None
    """The verifier that a converted draft names."""


class ConversionFinding(_Part):
    """What `speculators convert` would do with the checkpoint."""

    possible: bool
    why_not: str | None = None
    command: str | None = None
    """The command that converts it; OUTPUT and BASE_MODEL are to be filled in."""
    layer_config: dict[str, Any] | None = None
    """The transformer_layer_config that it would write."""
    config_left_out: dict[str, str] = Field(default_factory=dict)
    """Key of config.json → why it is left out."""
    discrepancies: list[str] = Field(default_factory=list)
    """Where config, tensors and reference disagree."""


class ServingFinding(_Part):
    """An engine that serves the draft; of what is not of a family, drafts of its kind."""

    engine: str
    option: str
    """What to tell it: vLLM's method, SGLang's algorithm, and so on."""
    until: str | None
    """The last release that serves them; null if the current one does."""
    note: str | None
    export: str | None = None
    """The target of `speculators export` that writes what it reads; null if it reads the draft as
    converted, or as published where it is not converted."""


class RefusalFinding(_Part):
    """An engine that does not serve the draft, or not in one of its ways."""

    engine: str
    note: str | None
    """Which of its ways is meant, such as that without the plugin; null for the only one."""
    export: str | None
    """The target of `speculators export` that is refused; null if the engine has none."""
    why: str


class MtpFinding(_Part):
    """The MTP (multi-token prediction) of a language model."""

    type: str
    title: str
    """The type in words."""
    state: Literal["complete", "incomplete", "missing"]
    """Missing: config.json promises it, and none of its tensors is there."""
    layers: int
    """How many layers there are."""
    key: str
    """The key of config.json that promises it."""
    promised: int | None
    """How many layers that key says; null if it says none."""
    tensors: int
    bytes: int
    missing: list[str]
    """Tensors that should be there, and are not."""
    stored: dict[str, int]
    """How its matrices are stored, such as F8_E4M3 with weight_scale_inv → how many are so."""
    quantized: bool
    not_excluded: list[str]
    """Modules that are not quantized, while the quantization_config leaves them to be."""


class Finding(Ending, _Part):
    """What a checkpoint is."""

    schema_version: Literal[2] = 2
    name: str
    """The path or the Hub id, as it was given."""
    kind: str
    """One of the table in docs/families.md, or unknown."""
    family: str | None = None
    """The family of drafts that it belongs to, converted or not; null if it is of none."""
    title: str
    """The kind in words, with the features."""
    evidence: list[str]
    """What shows the kind."""
    quantized: list[str]
    """What shows that the weights are quantized; empty if nothing does."""
    near: list[NearFinding]
    """For an unknown checkpoint: the kinds that it resembles, the nearest first."""
    notes: list[str]
    """What cannot be determined, and what is wrong."""
    converted_from: RepositoryRecord | None = None
    """For kind speculators: the source that its conversion.json records."""
    layout: Literal["current", "0.1.0 to 0.3.0"] | None = None
    """For kind speculators: which versions' names its tensors have."""
    features: dict[str, list[str]] | None = None
    """For a draft of a family: optional feature → the tensors that show it, if any."""
    facts: dict[str, str] = Field(default_factory=dict)
    """For a draft of a family: what else is worth knowing about it, such as who published it."""
    serving: list[ServingFinding] | None = None
    """For a draft: the engines that serve it, if any; null for what is not a draft."""
    not_serving: list[RefusalFinding] = Field(default_factory=list)
    """For a draft: the engines that do not serve it, and why; of what is not of a family, those
    that serve other drafts of its kind."""
    exports: list[str] | None = None
    """For a converted draft: the targets of `speculators export` that can compute it."""
    sizes: dict[str, int]
    """Sizes, by their keys in config.json."""
    parameters: int
    """Elements of all tensors."""
    bytes: int
    """Bytes of all tensors."""
    dtypes: dict[str, int]
    """Dtype → how many tensors have it."""
    tensors: list[TensorFinding]
    verifier: VerifierFinding | None = None
    mtp: MtpFinding | None = None
    """For a checkpoint that has an MTP, or promises one."""
    conversion: ConversionFinding
