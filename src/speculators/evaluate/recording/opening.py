"""Opening a draft to score it on a recording; without torch."""

from pathlib import Path

from loguru import logger

from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.errors import SpeculatorsError
from speculators.evaluate.recording.manifest import Recording, identify
from speculators.evaluate.subject.opening import Opened, open_draft

__all__ = ["open_scored"]


def open_scored(
    source: str | Path,
    recording: Recording,
    *,
    hub: HubAccess = DEFAULT_ACCESS,
    revision: str | None = None,
    verifier: str | Path | None = None,
) -> Opened:
    """Open a converted draft with the verifier of a recording; weights are not read.

    Args:
        source: as for ``open_draft``, like all that are not listed.
        recording: the recording.
        hub: likewise.
        revision: likewise.
        verifier: where the verifier is; if not given, where it was when it was recorded.

    Raises:
        EvaluationError: if the recording is not of that verifier, or not of the one that the
            draft's config names, or lacks states that the draft reads; or the draft is an MTP.
        FormatError, VerifierError, CheckpointError, HubError: as for ``open_draft``.

    """
    recorded = recording.manifest.verifier.name
    opened = open_draft(source, hub, revision=revision, verifier=verifier or recorded)
    recording.check_verifier(identify(opened.verifier), str(source))
    recording.check_layers(opened.converted.config.verifier_layers, str(source))
    named = opened.converted.config.speculators_config.verifier.name_or_path
    if verifier is None and named not in {None, recorded}:
        try:
            own = opened.converted.open_verifier()
        except SpeculatorsError as error:
            logger.debug(f"The verifier that {source} names is not here: {error}")
        else:
            recording.check_verifier(identify(own), str(source))
    return opened
