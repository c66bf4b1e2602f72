"""An MTP as what is measured: it stays in its verifier's own layout; without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.checkpoint.hub.headers import headers_only
from speculators.checkpoint.reader import read_config, read_names, read_tensors
from speculators.checkpoint.repository import Repository, open_repository
from speculators.checkpoint.verifier import Verifier, open_verifier
from speculators.errors import CheckpointError, GenerationError, VerifierError
from speculators.format.config import ProposalMethod
from speculators.format.proposals import CHAINS, check_sizes, resized
from speculators.mtp.computed import computed_as
from speculators.mtp.find import Mtp, body_layers, find_mtp

__all__ = ["OpenedMtp", "mtp_proposals", "mtp_repository", "open_mtp"]


@dataclass(frozen=True, slots=True)
class OpenedMtp:
    """An MTP and its verifier, without their weights.

    Attributes:
        name: the directory or Hub id, as given.
        commit: on the Hub; ``None`` for a directory.
        revision: as given.
        verifier: the one given, or the checkpoint that the MTP is in.
        verifier_name: as given, if one was.

    """

    name: str
    commit: str | None
    revision: str | None
    verifier: Verifier
    verifier_name: str


def open_mtp(
    directory: str | Path,
    *,
    verifier: str | Path | None = None,
    cache_dir: Path | None = None,
    revision: str | None = None,
) -> OpenedMtp | None:
    """Open the MTP of a checkpoint in its verifier's own layout; ``None`` if there is none.

    Args:
        directory: the directory or Hub id of an MTP that was cut out of its verifier, or of a
            verifier with its MTP.
        verifier: a directory or a Hub id; needed if the verifier's own layers are not there.
        cache_dir: where downloads are kept.
        revision: a branch, tag or commit of the MTP on the Hub.

    Raises:
        FormatError: if there is an MTP, but of a kind that is not computed here.
        VerifierError: if there is an MTP, but no verifier.

    """
    found = _find(directory, revision, cache_dir)
    if found is None:
        return None
    repository, config, mtp, names = found
    with headers_only(repository) as light:
        tensors = read_tensors(light, only=mtp.names)
    computed_as(
        repository.name,
        config,
        mtp,
        {name: it for name, it in tensors.items() if name in mtp.slots},
    )
    if verifier is None and not body_layers(mtp, names):
        raise VerifierError(
            f"{repository.name} is an MTP without its verifier; give that with --verifier."
        )
    opened = open_verifier(repository.name if verifier is None else verifier, cache_dir=cache_dir)
    name = opened.name if verifier is None else str(verifier)
    return OpenedMtp(str(directory), repository.commit, revision, opened, name)


def mtp_repository(
    directory: str | Path, *, cache_dir: Path | None, revision: str | None
) -> Repository | None:
    """Where an MTP in its verifier's own layout is, as for ``open_mtp``; ``None`` if there is none.

    The verifier need not be there.
    """
    found = _find(directory, revision, cache_dir)
    return None if found is None else found[0]


def _find(
    directory: str | Path, revision: str | None, cache_dir: Path | None
) -> tuple[Repository, dict[str, Any], Mtp, set[str]] | None:
    """The checkpoint, its config, its MTP, and the names of all tensors; ``None`` without one."""
    try:
        repository = open_repository(directory, revision=revision, cache_dir=cache_dir)
        config, _ = read_config(repository)
        if "speculators_model_type" in config:
            return None
        with headers_only(repository) as light:
            names = read_names(light)
    except CheckpointError:
        return None  # what is wrong is told where a converted draft is looked for
    mtp = find_mtp(config, names)
    return (repository, config, mtp, names) if mtp is not None and mtp.slots else None


def mtp_proposals(proposal: str | None, lengths: list[int] | list[None]) -> list[ProposalMethod]:
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
