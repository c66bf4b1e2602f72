"""A family of drafts as one value: all that the general code needs to know about it.

Its model and its independent reference are given by name, since they need torch; they are imported
when they are used.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from speculators.checkpoint.reader import Checkpoint
from speculators.checkpoint.tensor import TensorInfo
from speculators.checkpoint.verifier import Verifier
from speculators.families.signature import Signature
from speculators.format.config import LayerConfig, SpeculatorConfig
from speculators.format.tensors import TensorSpec, counts_shown, features_shown

__all__ = ["Card", "Derived", "Family", "Flag", "Names", "Source", "Target", "imported"]


@dataclass(frozen=True, slots=True)
class Source:
    """What a family derives a config from.

    Attributes:
        checkpoint: the checkpoint as it was published.
        tensors: its tensors, by their names in the format.
        features: the features that the tensors show.
        verifier: the model that the draft was trained for; ``None`` if it is not known yet.

    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    features: frozenset[str]
    verifier: Verifier | None


@dataclass(frozen=True, slots=True)
class Derived:
    """The config of a converted draft, as far as it follows from the source.

    Attributes:
        layer: the config of the draft's decoder layers.
        keys: the family's own keys of config.json.
        architectures: those of config.json.
        discrepancies: clauses for the log: where config, tensors and reference disagree.
        left_out: key of the source's config → why it is left out.

    """

    layer: LayerConfig
    keys: dict[str, Any]
    architectures: list[str]
    discrepancies: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


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
class Target:
    """A layout to export to.

    Attributes:
        reader: who reads it, for messages.
        layers: ``model_type`` of the draft's layer → the keys of config.json that tell the reader
            which model to build.
        lacks: the features that it cannot express.
        activation: the only one that it computes; ``None`` if it computes any.
        zeros: features whose tensors the reader always wants; a draft without them gets zeros.
        remarks: feature → a sentence for the log on what becomes of it; ``None`` for one that
            concerns every draft.

    """

    reader: str
    layers: Mapping[str, Mapping[str, Any]]
    lacks: frozenset[str] = frozenset()
    activation: str | None = None
    zeros: frozenset[str] = frozenset()
    remarks: Mapping[str | None, str] = field(default_factory=dict)


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
        return self.renames.get(research) or _with_prefix(research, self.prefixes)

    def in_research(self, name: str) -> str:
        """The name in a research checkpoint of a tensor of the format."""
        return self._research.get(name, name)

    def current(self, name: str) -> str:
        """The name in the format, whichever version wrote it."""
        return _with_prefix(name, self.older)


def _with_prefix(name: str, prefixes: Mapping[str, str]) -> str:
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
        method: vLLM's name for this way of speculating.
        tags: for the Hub.

    """

    draft: str
    method: str
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
        card: what the model card says about it.
        export_config: the config.json of a target's layout, from a draft's config.
        targets: what it can be exported to, by the names on the command line.
        flags: the options of its conversion.
        example: the Hub ids of a draft and its verifier, for the help of the command line.
        unusual: the features that are worth naming in a title.
        model_types: the values of ``speculators_model_type`` in the configs of its drafts, if there
            are others than its name.
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
    export_config: Callable[[Any, Target], dict[str, Any]]
    targets: Mapping[str, Target] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    example: tuple[str, str] = ("ORG/DRAFT", "ORG/VERIFIER")
    unusual: tuple[str, ...] = ()
    ambiguity: Callable[[str], str] | None = None
    model_types: tuple[str, ...] = ()

    def features_of(self, names: Collection[str]) -> frozenset[str]:
        """The features that tensors of these names in the format show."""
        shown = features_shown(self.tensors, names, counts_shown(self.tensors, names))
        return frozenset(feature for feature, found in shown.items() if found)


def imported(name: str) -> Any:
    """The object that ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
