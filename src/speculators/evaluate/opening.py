"""What an evaluation is asked to measure, checked before torch is imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from speculators.checkpoint.verifier import Verifier
from speculators.errors import (
    EvaluationError,
    FormatError,
    GenerationError,
    SpeculatorsError,
    VerifierError,
)
from speculators.evaluate.mtp import mtp_repository
from speculators.evaluate.recording import Recording, identify
from speculators.families.converted import Converted, open_converted
from speculators.format.config import ProposalMethod
from speculators.format.proposals import CHAINS, check_sizes, proposal_method

__all__ = ["SPREAD", "Opened", "check_device", "open_draft", "open_scored", "proposals_of"]

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

    @property
    def commit(self) -> str | None:
        """The draft's commit on the Hub; ``None`` for a directory."""
        return self.converted.checkpoint.commit


def open_draft(
    directory: str | Path,
    *,
    verifier: str | Path | None = None,
    cache_dir: Path | None = None,
    revision: str | None = None,
) -> Opened:
    """Open a converted draft and its verifier; weights are not read.

    Args:
        directory: the directory or Hub id of a converted draft.
        verifier: a directory or a Hub id; the one that the draft's config names if not given.
        cache_dir: where downloads are kept.
        revision: a branch, tag or commit of the draft on the Hub.

    Raises:
        FormatError: if it is not a converted draft.
        EvaluationError: if it is an MTP.
        VerifierError: if there is no verifier, or it does not fit.
        CheckpointError, HubError: if something cannot be read or downloaded.

    """
    try:
        converted = open_converted(directory, revision=revision, cache_dir=cache_dir)
    except FormatError as error:
        if mtp_repository(directory, revision=revision, cache_dir=cache_dir) is None:
            raise
        raise EvaluationError(
            f"{directory} has an MTP, which is no converted draft, so there is no chat with it, "
            "and it is not scored on a recording; `speculators evaluate` measures those of "
            "Qwen3-Next and Qwen3.5."
        ) from error
    opened = _open_verifier(converted, verifier)
    name = opened.name if verifier is None else str(verifier)
    return Opened(str(directory), converted, opened, name)


def open_scored(
    directory: str | Path,
    recording: Recording,
    *,
    verifier: str | Path | None = None,
    cache_dir: Path | None = None,
    revision: str | None = None,
) -> Opened:
    """Open a converted draft with the verifier of a recording; weights are not read.

    Args:
        directory: as for ``open_draft``, like all that are not listed.
        recording: the recording.
        verifier: where the verifier is; if not given, where it was when it was recorded.
        cache_dir: likewise.
        revision: likewise.

    Raises:
        EvaluationError: if the recording is not of that verifier, or not of the one that the
            draft's config names, or drafts of this kind cannot be scored.
        FormatError, VerifierError, CheckpointError, HubError: as for ``open_draft``.

    """
    recorded = recording.manifest.verifier.name
    opened = open_draft(
        directory, verifier=verifier or recorded, cache_dir=cache_dir, revision=revision
    )
    if opened.converted.config.drafted_per_block is not None:
        raise EvaluationError(
            f"{directory} drafts in blocks, and such drafts cannot be scored on a recording; leave "
            "out --recording."
        )
    recording.check_verifier(identify(opened.verifier), str(directory))
    named = opened.converted.config.speculators_config.verifier.name_or_path
    if verifier is None and named not in {None, recorded}:
        try:
            own = opened.converted.open_verifier()
        except SpeculatorsError as error:
            logger.debug(f"The verifier that {directory} names is not here: {error}")
        else:
            recording.check_verifier(identify(own), str(directory))
    return opened


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
