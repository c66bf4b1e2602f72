"""A family of drafts as one value: all that the general code needs to know about it.

Its model, its independent reference and its check are given by name, since they need torch; they
are imported when they are used.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from speculators.checkpoint.reader import Checkpoint
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo
from speculators.checkpoint.verifier import Verifier
from speculators.errors import ConversionError
from speculators.families.signature import Signature
from speculators.families.target import Target
from speculators.format.config import LayerConfig, SpeculatorConfig
from speculators.format.tensors import TensorSpec, counts_shown, features_shown

__all__ = [
    "Card",
    "Completion",
    "Derived",
    "Family",
    "Flag",
    "Names",
    "Option",
    "Source",
    "imported",
    "read_options",
    "with_prefix",
]


@dataclass(frozen=True, slots=True)
class Source:
    """What a family derives a config from.

    Attributes:
        checkpoint: the checkpoint as it was published.
        tensors: its tensors, by their names in the format.
        features: the features that the tensors show.
        verifier: the model that the draft was trained for; ``None`` if it is not known yet. Then
            nothing is asked for, and no data of a tensor is read.
        options: what the user said about it: name of an option → its value.
        names: name of a tensor in the checkpoint → the same without what training code put before.

    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    features: frozenset[str]
    verifier: Verifier | None
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows from a source's tensors before they are compared with the family's table.

    Attributes:
        made: name in the format → a tensor that others determine, or a stored one in another form.
        left_out: stored name → why the tensor is left out.
        discrepancies: clauses for the log.

    """

    made: dict[str, PlannedTensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    discrepancies: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Derived:
    """The config of a converted draft, as far as it follows from the source.

    Attributes:
        layer: the config of the draft's decoder layers.
        keys: the family's own keys of config.json.
        architectures: those of config.json.
        discrepancies: clauses for the log: where config, tensors and reference disagree.
        left_out: key of the source's config → why it is left out.
        model_type: the ``speculators_model_type``; the family's name if not given.
        proposals: the proposal methods to write; the default one if not given.
        facts: what is worth knowing about the draft: label → text, for ``inspect``.
        supposed_depth: how many layers a verifier has that fits those of ``keys`` that only a
            verifier could tell, where none is known; ``None`` if there are none of these.

    """

    layer: LayerConfig
    keys: dict[str, Any]
    architectures: list[str]
    discrepancies: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None
    proposals: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    supposed_depth: int | None = None


@dataclass(frozen=True, slots=True)
class Flag:
    """A feature that a user may ask for: conversion then fails unless the tensors show it.

    Attributes:
        feature: a key of the family's features.
        help: what the option does.

    """

    feature: str
    help: str


@dataclass(frozen=True, slots=True)
class Option:
    """Something that a user can say about a checkpoint where its files leave it open.

    Attributes:
        name: its name in Python and in manifests.
        metavar: the form of its value on the command line; empty for one that is said with
            ``--name`` or ``--no-name``.
        help: what it says.
        read: turns the text of the command line, or a value of a manifest or of Python, into the
            value; raises ``ValueError`` with a clause on what is expected.

    """

    name: str
    metavar: str
    help: str
    read: Callable[[Any], Any]

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def answers(self) -> str:
        """How a message asks for it."""
        return self.flag if self.metavar else f"{self.flag} or --no-{self.flag[2:]}"


def read_options(options: Collection[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that are given; ``None`` stands for one that is not.

    Raises:
        ConversionError: if an option is not known, or its value is not a possible one.

    """
    known = {option.name: option for option in options}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in known:
            raise ConversionError(
                f"{name} does not apply to this kind of draft, which has "
                f"{'the options ' + ', '.join(known) if known else 'no such options'}."
            )
        try:
            values[name] = known[name].read(value)
        except ValueError as error:
            raise ConversionError(f"{known[name].flag}: {error}.") from error
    return values


class Names:
    """The names of tensors in research checkpoints and in the format, mapped both ways.

    Args:
        renames: name in a research checkpoint → name in the format, where they differ.
        older: prefix of names that earlier versions wrote → prefix now; the first match counts.
        prefixes: prefix of names that some research checkpoints have → prefix in the format;
            others have the format's.

    """

    def __init__(
        self,
        renames: Mapping[str, str] | None = None,
        older: Mapping[str, str] | None = None,
        prefixes: Mapping[str, str] | None = None,
    ) -> None:
        self.renames = dict(renames or {})
        self.older = dict(older or {})
        self.prefixes = dict(prefixes or {})
        self._research = {current: research for research, current in self.renames.items()}

    def in_format(self, research: str) -> str:
        """The name in the format of a research checkpoint's tensor."""
        return self.renames.get(research) or with_prefix(research, self.prefixes)

    def in_research(self, name: str) -> str:
        """The name in a research checkpoint of a tensor of the format."""
        return self._research.get(name, name)

    def current(self, name: str) -> str:
        """The name in the format, whichever version wrote it."""
        return with_prefix(name, self.older)


def with_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """``name`` with the first of the prefixes that it has replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says about a family.

    Attributes:
        draft: what a draft is called, with its article.
        tags: for the Hub.

    """

    draft: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of drafts.

    Attributes:
        name: its name for programs: of the command that converts it, and in the config.
        noun: one draft of the family, with an article, as it follows "convert".
        signature: how its checkpoints are recognised.
        config: its config.json.
        tensors: its tensors; those of optional features among them.
        features: feature of a draft → what messages call it.
        names: research names and the format's names of its tensors.
        omissions: pattern of tensors that a checkpoint may have, but the format leaves out → why.
            A head is compared with the verifier's first.
        derive: derives the config from a source.
        borrows: the matrices that a draft takes from its verifier: ``head``, and ``embedding`` if
            it has none of its own.
        model: the class of its model, as ``module:class``.
        reference: an independent computation to compare the model with, likewise.
        check: the class that compares the two, likewise; by default that of drafts that go from
            token to token. It is called with a ``ConversionPlan`` and the model, which computes in
            float32, and has ``run()``, which raises ``ValidationError``, and ``unchecked``,
            sentences on what could not be checked.
        card: what the model card says about it.
        export_config: the config.json of a target's layout, from a draft's config.
        as_converted: who serves a converted directory as it is; ``None`` if no engine does.
        targets: what it can be exported to, by the names on the command line.
        flags: the features that its conversion can be asked to require.
        options: what else a user can say about a checkpoint.
        facts: what is worth knowing about a converted draft, by its config: label → text.
        complete: what follows from a source's tensors before they are judged.
        converts_again: whether a directory in the format, by its config.json, leaves out what this
            version writes, so that it is a source like any other.
        example: the Hub ids of a draft and its verifier, for the help of the command line.
        unusual: the features that are worth naming in a title.
        model_types: the values of ``speculators_model_type`` in the configs of its drafts, if there
            are others than its name.
        companions: the names of files that may lie beside the weights and belong to the draft; a
            config says which do.
        beside: pattern of other files that are published beside such drafts → what to know about
            them, as a clause that follows their name.
        ambiguity: what a checkpoint's tensors cannot tell, given its name, for ``inspect``.

    """

    name: str
    noun: str
    signature: Signature
    config: type[SpeculatorConfig]
    tensors: tuple[TensorSpec, ...]
    features: Mapping[str, str]
    names: Names
    omissions: Mapping[str, str]
    derive: Callable[[Source], Derived]
    borrows: Collection[str]
    model: str
    reference: str
    card: Card
    export_config: Callable[[Any, Any], dict[str, Any]]
    check: str = "speculators.convert.checks.recurrent:RecurrentCheck"
    as_converted: Target | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    options: tuple[Option, ...] = ()
    facts: Callable[[Any], dict[str, str]] = lambda config: {}  # noqa: ARG005
    complete: Callable[[Source], Completion] = lambda source: Completion()  # noqa: ARG005
    converts_again: Callable[[Mapping[str, Any]], bool] = lambda config: False  # noqa: ARG005
    example: tuple[str, str] = ("ORG/DRAFT", "ORG/VERIFIER")
    unusual: tuple[str, ...] = ()
    ambiguity: Callable[[str], str] | None = None
    model_types: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)

    def wanted(self, feature: str) -> str:
        """What a message calls a feature that a draft lacks, perhaps one of another family."""
        return self.features.get(feature, feature).removeprefix("a ")

    def features_of(self, names: Collection[str]) -> frozenset[str]:
        """The features that tensors of these names in the format show."""
        shown = features_shown(self.tensors, names, counts_shown(self.tensors, names))
        return frozenset(feature for feature, found in shown.items() if found)


def imported(name: str) -> Any:
    """The object that ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
