"""What an evaluation is asked to measure, checked before torch is imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.reader import read_config
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.verifier import Verifier
from speculators.errors import (
    EvaluationError,
    GenerationError,
    SpeculatorsError,
    VerifierError,
)
from speculators.evaluate.subject.mtp import FoundMtp, OpenedMtp, look_for_mtp, open_mtp
from speculators.families.converted import Converted, read_converted
from speculators.format.config import ProposalMethod
from speculators.format.proposals import CHAINS, check_sizes, proposal_method

__all__ = [
    "SPREAD",
    "Opened",
    "check_device",
    "find_draft",
    "open_draft",
    "open_subject",
    "proposals_of",
]

SPREAD = "auto"
"""The name of a device that stands for all of them."""

DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "mtia", "mlu", "musa", "xla")
"""The names of torch's devices, those that come with packages of their own included."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A converted draft and a verifier for it, without their weights.

    Attributes:
        name: the draft's directory or Hub id, as given.
        converted: the draft.
        verifier: the one given, or the one that the draft's config names.
        verifier_name: as given, if one was.

    """

    name: str
    converted: Converted
    verifier: Verifier
    verifier_name: str


def find_draft(
    source: str | Path, hub: HubAccess = DEFAULT_ACCESS, *, revision: str | None = None
) -> Converted | FoundMtp:
    """Find a converted draft, or an MTP in its verifier's own layout.

    Args:
        source: the directory or Hub id.
        hub: the cache and the token.
        revision: a branch, tag or commit on the Hub.

    Raises:
        FormatError: if it is neither.
        CheckpointError, HubError: if something cannot be read or downloaded.

    """
    repository = open_repository(source, hub, revision=revision)
    config, config_file = read_config(repository)
    return look_for_mtp(repository, config) or read_converted(repository, config, config_file)


def open_subject(
    source: str | Path,
    hub: HubAccess = DEFAULT_ACCESS,
    *,
    revision: str | None = None,
    verifier: str | Path | None = None,
) -> Opened | OpenedMtp:
    """Open a converted draft or an MTP, and its verifier; weights are not read.

    Args:
        source: as for ``find_draft``, like all that are not listed.
        hub: likewise, for the verifier, too.
        revision: likewise.
        verifier: a directory or a Hub id. If not given, the one that the draft's config names, or
            the checkpoint that the MTP is in.

    Raises:
        FormatError, CheckpointError, HubError: as for ``find_draft``.
        VerifierError: if there is no verifier, or it does not fit.

    """
    found = find_draft(source, hub, revision=revision)
    if isinstance(found, FoundMtp):
        return open_mtp(str(source), found, verifier)
    return _open_converted(str(source), found, verifier)


def open_draft(
    source: str | Path,
    hub: HubAccess = DEFAULT_ACCESS,
    *,
    revision: str | None = None,
    verifier: str | Path | None = None,
) -> Opened:
    """Open a converted draft and its verifier, as ``open_subject`` does.

    Raises:
        EvaluationError: if it is an MTP.
        FormatError, CheckpointError, HubError, VerifierError: as for ``open_subject``.

    """
    found = find_draft(source, hub, revision=revision)
    if isinstance(found, FoundMtp):
        raise EvaluationError(
            f"{source} has an MTP, not a converted draft: `chat` and `--recording` do not take "
            "one; `speculators evaluate` measures those of Qwen3-Next and Qwen3.5."
        )
    return _open_converted(str(source), found, verifier)


def _open_converted(name: str, converted: Converted, verifier: str | Path | None) -> Opened:
    opened = _open_verifier(converted, verifier)
    return Opened(name, converted, opened, opened.name if verifier is None else str(verifier))


def _open_verifier(converted: Converted, given: str | Path | None) -> Verifier:
    if given is not None:
        return converted.open_verifier(given)
    named = converted.config.speculators_config.verifier.name_or_path
    if named is None:
        raise VerifierError(
            f"{converted.directory} names no verifier in its config.json; give it with --verifier."
        )
    try:
        return converted.open_verifier()
    except SpeculatorsError as error:
        raise VerifierError(
            f"{error} The draft's config.json names it; give another with --verifier."
        ) from error


def proposals_of(
    converted: Converted, proposal: str | None, lengths: Sequence[int | None]
) -> list[ProposalMethod]:
    """The proposal methods to measure, one for each length.

    Args:
        converted: the draft.
        proposal: the type; the config's default if not given.
        lengths: numbers of draft tokens; ``None`` for the method's own.

    Raises:
        GenerationError: if the draft cannot propose that way.

    """
    config = converted.config
    most = config.drafted_per_block
    methods = [proposal_method(config.speculators_config, proposal, it, most) for it in lengths]
    for method in methods:
        check_sizes(method)
        if config.parallel and method.proposal_type not in CHAINS:
            raise GenerationError(
                f"{converted.checkpoint.name} drafts all tokens in one pass, so it proposes "
                f"chains, not {method.proposal_type!r}; choose {' or '.join(CHAINS)}."
            )
        if most is not None and method.speculative_tokens > most:
            raise GenerationError(
                f"{converted.checkpoint.name} drafts up to {most} tokens in a block, not "
                f"{method.speculative_tokens}; choose fewer draft tokens."
            )
    return methods


def check_device(name: str | None) -> None:
    """Check that a device is one of torch's, as far as its name tells.

    Raises:
        EvaluationError: if not.

    """
    if name is None or name == SPREAD:
        return
    kind = re.fullmatch(r"([a-z]+)(?::\d+)?", name)
    if kind is None or kind[1] not in DEVICES:
        raise EvaluationError(
            f"The device {name!r} cannot be used: torch has no such kind; give one like cpu or "
            f"cuda:1, or {SPREAD}."
        )
