"""Publish a directory that `convert` created."""

from pathlib import Path

from loguru import logger

from speculators.checkpoint.hub.upload import README, check_upload, upload
from speculators.checkpoint.output.stamp import write_stamped
from speculators.convert.provenance import read_record
from speculators.errors import HubError
from speculators.evaluate.report import REPORT_FILE
from speculators.families.card import model_card, names_hub_id
from speculators.families.converted import open_converted
from speculators.publish.figures import evaluation_section, read_report

__all__ = ["check_publishing", "publish_draft"]


def check_publishing(repo_id: str, report: Path | None) -> None:
    """Check what can be checked before there is a draft to publish, without the network.

    Raises:
        HubError: if the id is invalid, there is no access token, or offline mode is on.
        EvaluationError: if the report cannot be read or is not one.

    """
    check_upload(repo_id)
    if report is not None:
        read_report(report)


def publish_draft(
    directory: Path, repo_id: str, *, private: bool = False, report: Path | None = None
) -> str:
    """Upload a converted draft to the Hub, with a model card.

    The card is written into the directory, unless one is there that somebody wrote or edited. The
    report is copied there, too, for later cards. Whether the draft is sound is not checked: that is
    up to the caller.

    Args:
        directory: what a conversion created.
        repo_id: the id of the repository, which is created if needed.
        private: whether a new repository is private; if so, an existing public one is refused.
        report: what `speculators evaluate` wrote, for the card.

    Returns:
        The URL of the commit.

    Raises:
        FormatError, CheckpointError: if it is not a converted draft.
        EvaluationError: if the report cannot be read or is not one.
        HubError: if the upload fails; the directory is complete all the same.

    """
    if report is not None:
        given = read_report(report)
        if given.draft != repo_id and Path(given.draft).resolve() != directory.resolve():
            logger.warning(f"The report is about {given.draft}: make sure that it is {directory}")
        (directory / REPORT_FILE).write_text(given.model_dump_json(indent=2) + "\n")
    report = directory / REPORT_FILE
    converted = open_converted(directory)
    card = model_card(
        repo_id,
        converted.family,
        converted.config,
        parameters=converted.parameters,
        features=converted.features,
        record=read_record(directory),
        evaluation=evaluation_section(read_report(report)) if report.is_file() else None,
    )
    if not write_stamped(directory / README, card):
        logger.warning(
            f"{directory / README} was written or edited by somebody, and is published as it is"
        )
    verifier = converted.config.speculators_config.verifier.name_or_path
    if verifier is None or not names_hub_id(verifier):
        logger.warning(
            f"The verifier is not named by a Hugging Face id but by {verifier}: whoever downloads "
            f"{repo_id} has to say which it is"
        )
    try:
        url = upload(directory, repo_id, private=private or None)
    except HubError as error:
        raise HubError(
            f"{error} The draft in {directory} is complete; publish it later: "
            f"speculators publish {directory} {repo_id}"
        ) from error.__cause__
    logger.success(f"Published at: {url}")
    return url
