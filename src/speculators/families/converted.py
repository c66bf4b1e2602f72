"""A directory in the speculators format, opened and checked without reading tensor data."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError as PydanticValidationError

from speculators.checkpoint.headers import headers_only
from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.reader import (
    Checkpoint,
    find_companions,
    read_config,
    read_tensors,
)
from speculators.checkpoint.repository import Repository, open_repository
from speculators.checkpoint.tensor import TensorInfo, describe_shape
from speculators.checkpoint.verifier import Verifier, open_verifier
from speculators.errors import (
    CheckpointError,
    ConversionError,
    FormatError,
    SpeculatorsError,
    VerifierError,
)
from speculators.families.family import Family
from speculators.families.recognition import recognise
from speculators.families.registry import families, family_named
from speculators.families.research.vocabulary import read_tokens
from speculators.format.config import SpeculatorConfig
from speculators.format.problems import first_problem
from speculators.format.tensors import compare, required_tensors

__all__ = ["Converted", "check_converted", "open_converted", "parse_config", "read_converted"]


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted draft on this machine.

    Attributes:
        family: the family of the draft.
        checkpoint: its config.json and tensors as they are stored.
        config: the checked config.
        tensors: its tensors by their current names, whichever version wrote them.
        features: the features that they show.

    """

    family: Family
    checkpoint: Checkpoint
    config: SpeculatorConfig
    tensors: dict[str, TensorInfo]
    features: frozenset[str]

    @property
    def repository(self) -> Repository:
        """Where its files are."""
        return self.checkpoint.repository

    @property
    def directory(self) -> Path:
        """The folder of config.json and the weights."""
        return self.checkpoint.config_file.parent

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(info.elements for info in self.tensors.values())

    def open_verifier(self, other: str | os.PathLike[str] | None = None) -> Verifier:
        """Open the verifier that the config names, or another one.

        Raises:
            VerifierError: if the config names none, or it cannot be read or does not fit.
            HubError: if it cannot be fetched from the Hub.

        """
        named = other if other is not None else self.config.speculators_config.verifier.name_or_path
        if named is None:
            raise VerifierError(f"The config.json of {self.checkpoint.name} names no verifier.")
        verifier = open_verifier(named, self.repository.hub)
        vocabulary, hidden = self.config.verifier_sizes
        verifier.check_fits(hidden, vocabulary)
        return verifier

    def verifier_layers(self) -> int | None:
        """The number of its verifier's layers; ``None`` if that is not known."""
        try:
            return self.open_verifier().layers
        except SpeculatorsError:
            return None


def open_converted(
    source: str | os.PathLike[str],
    hub: HubAccess = DEFAULT_ACCESS,
    *,
    revision: str | None = None,
) -> Converted:
    """Find a converted draft, and check its tensors' names, shapes and dtypes.

    Args:
        source: a directory or a Hub id.
        hub: the cache and the token, for the draft and its verifier.
        revision: a branch, tag or commit on the Hub.

    Raises:
        FormatError: if it is not in the format, or its tensors are not those of its config.
        CheckpointError, HubError: if it cannot be read or downloaded.

    """
    repository = open_repository(source, hub, revision=revision)
    return read_converted(repository, *read_config(repository))


def read_converted(repository: Repository, config: dict[str, Any], config_file: Path) -> Converted:
    """Check a draft of which only the config.json was read; see ``open_converted``."""
    if "speculators_model_type" not in config:
        _refuse_what_is_not_converted(repository, config)
    parsed = parse_config(config, repository.name)  # before the weights are fetched
    tensors = read_tensors(repository)
    companions = find_companions(repository, parsed[0].companions)
    checkpoint = Checkpoint(repository, config, config_file, tensors, companions=companions)
    converted = _checked(checkpoint, *parsed)
    _check_tables(converted)
    return converted


def _check_tables(converted: Converted) -> None:
    """Check the tables of the tokens that are drafted: wrong ones propose wrong tokens, or none.

    Raises:
        FormatError: if they are not what they should be.

    """
    d2t, t2d = (converted.tensors.get(name) for name in ("d2t", "t2d"))
    if d2t is None or not d2t.elements:
        return
    vocabulary, _ = converted.config.verifier_sizes
    try:
        read_tokens(d2t, t2d, d2t.shape[0], vocabulary)
    except ConversionError as error:
        raise FormatError(str(error)) from error


def _refuse_what_is_not_converted(repository: Repository, config: dict[str, Any]) -> None:
    """Refuse what cannot be converted either, and say what to do with it.

    Raises:
        FormatError: if it is one.

    """
    try:
        with headers_only(repository) as light:
            signature = recognise(config, read_tensors(light)).signature
    except CheckpointError:
        return  # so it is not known what it is
    if signature is None or not signature.advice:
        return
    if signature.serving is None:  # it is no draft
        raise FormatError(
            f"Missing or incorrect speculators_model_type in {repository.name}: it holds "
            f"{signature.title}; {signature.advice}."
        )
    raise FormatError(
        f"{repository.name} holds {signature.title}, which is not converted: {signature.advice}."
    )


def check_converted(checkpoint: Checkpoint) -> Converted:
    """Check a draft that was read already; see ``open_converted``.

    Raises:
        FormatError: if it is not in the format, or its tensors are not those of its config.

    """
    return _checked(checkpoint, *parse_config(checkpoint.config, checkpoint.name))


def _checked(checkpoint: Checkpoint, family: Family, config: SpeculatorConfig) -> Converted:
    """Check the names, shapes and dtypes of a draft's tensors against its config."""
    tensors = {family.names.current(name): info for name, info in checkpoint.tensors.items()}
    features = family.features_of(tensors)
    # What is borrowed may be the draft's own; a config does not say so.
    own = features & set(family.borrows)
    required = required_tensors(family.tensors, config.features | own, config.counts)
    difference = compare(tensors, required, config.sizes)
    if difference.missing or difference.unknown:
        problem = (
            f"lacks {', '.join(sorted(difference.missing))}"
            if difference.missing
            else f"has unknown {', '.join(sorted(difference.unknown))}"
        )
        raise FormatError(f"{checkpoint.name} {problem}, by its config.json; convert it again.")
    for name, shape in difference.reshaped.items():
        raise FormatError(
            f"{checkpoint.name}: {tensors[name].name} has the shape "
            f"{describe_shape(tensors[name].shape)}, but by config.json it should have "
            f"{describe_shape(shape)}; convert it again."
        )
    for name, dtypes in difference.retyped.items():
        raise FormatError(
            f"{checkpoint.name}: {tensors[name].name} has the type {tensors[name].dtype}; "
            f"one of {', '.join(dtypes)} is expected."
        )
    there = checkpoint.companions.keys()
    if there != config.companions:
        lacks, has = sorted(config.companions - there), sorted(there - config.companions)
        problem = (
            f"lacks {', '.join(lacks)}, which its config.json names"
            if lacks
            else f"has {', '.join(has)}, which its config.json does not name"
        )
        raise FormatError(f"{checkpoint.name} {problem}; convert it again.")
    return Converted(family, checkpoint, config, tensors, config.features | own)


def parse_config(config: dict[str, Any], where: str) -> tuple[Family, SpeculatorConfig]:
    """Check a config.json against the format of its family.

    Args:
        config: the parsed JSON.
        where: the directory or file, for the message.

    Returns:
        The family, and the config as the family's model.

    Raises:
        FormatError: if it is not in the format; the message names the first wrong key, or how
            to convert the checkpoint if it is not a speculators directory at all.

    """
    model_type = config.get("speculators_model_type")
    family = family_named(model_type)
    if family is None:
        names = [it.name for it in families()]
        found = "it is missing" if model_type is None else f"found {model_type!r}"
        raise FormatError(
            f"Missing or incorrect speculators_model_type in {where}: expected "
            f"{' or '.join(map(repr, names))}, {found}. Convert the checkpoint first: speculators "
            f"convert auto {shlex.quote(where)} OUTPUT BASE_MODEL"
        )
    try:
        return family, family.config.model_validate(config)
    except PydanticValidationError as error:
        raise FormatError(f"{where}: config.json, {first_problem(error)}") from error
