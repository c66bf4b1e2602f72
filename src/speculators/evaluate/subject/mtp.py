"""An MTP as what is measured: it stays in its verifier's own layout; without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.checkpoint.headers import headers_only
from speculators.checkpoint.reader import read_names, read_tensors
from speculators.checkpoint.repository import Repository
from speculators.checkpoint.verifier import Verifier, open_verifier
from speculators.errors import CheckpointError, GenerationError, VerifierError
from speculators.format.config import ProposalMethod
from speculators.format.proposals import CHAINS, check_sizes, resized
from speculators.mtp.computed import computed_as
from speculators.mtp.find import Mtp, body_layers, find_mtp

__all__ = ["FoundMtp", "OpenedMtp", "look_for_mtp", "mtp_proposals", "open_mtp"]


@dataclass(frozen=True, slots=True)
class FoundMtp:
    """An MTP in its verifier's own layout.

    Attributes:
        repository: where it is.
        config: the config.json there.
        mtp: its tensors.
        has_body: whether the verifier's own layers are there, too.

    """

    repository: Repository
    config: dict[str, Any]
    mtp: Mtp
    has_body: bool


@dataclass(frozen=True, slots=True)
class OpenedMtp:
    """An MTP and its verifier, without their weights.

    Attributes:
        name: the directory or Hub id, as given.
        mtp: the MTP.
        verifier: the one given, or the checkpoint that the MTP is in.
        verifier_name: as given, if one was.

    """

    name: str
    mtp: FoundMtp
    verifier: Verifier
    verifier_name: str


def look_for_mtp(repository: Repository, config: dict[str, Any]) -> FoundMtp | None:
    """The MTP of a checkpoint in its verifier's own layout; ``None`` if it has none.

    Args:
        repository: of an MTP that was cut out of its verifier, or of a verifier with its MTP.
        config: the config.json there.

    """
    if "speculators_model_type" in config:
        return None
    try:
        with headers_only(repository) as light:
            names = read_names(light)
    except CheckpointError:
        return None  # looking for a converted draft says what is wrong
    mtp = find_mtp(config, names)
    if mtp is None or not mtp.slots:
        return None
    return FoundMtp(repository, config, mtp, bool(body_layers(mtp, names)))


def open_mtp(name: str, mtp: FoundMtp, verifier: str | Path | None) -> OpenedMtp:
    """Open the verifier of an MTP.

    Args:
        name: the MTP's directory or Hub id, as given.
        mtp: the MTP.
        verifier: a directory or a Hub id; needed if the verifier's own layers are not there.

    Raises:
        FormatError: if the MTP is of a kind that is not computed here.
        VerifierError: if there is no verifier.

    """
    repository = mtp.repository
    with headers_only(repository) as light:
        read = read_tensors(light, only=mtp.mtp.names)
    tensors = {it: info for it, info in read.items() if it in mtp.mtp.slots}
    computed_as(repository.name, mtp.config, mtp.mtp, tensors)
    if verifier is None and not mtp.has_body:
        raise VerifierError(
            f"{repository.name} is an MTP without its verifier; give that with --verifier."
        )
    opened = open_verifier(repository.name if verifier is None else verifier, repository.hub)
    return OpenedMtp(name, mtp, opened, opened.name if verifier is None else str(verifier))


def mtp_proposals(proposal: str | None, lengths: Sequence[int | None]) -> list[ProposalMethod]:
    """The proposal methods to measure, one for each length; ``None`` is the type's own.

    Raises:
        GenerationError: if there are no such proposals, or they are trees.

    """
    if proposal not in {None, *CHAINS}:
        raise GenerationError(
            "The verifier of such an MTP has linear attention, which runs along a single path, so "
            f"it cannot verify {proposal!r}; choose {' or '.join(CHAINS)}."
        )
    default = ProposalMethod(proposal_type=proposal or "greedy")
    methods = [default if length is None else resized(default, length) for length in lengths]
    for method in methods:
        check_sizes(method)
    return methods
