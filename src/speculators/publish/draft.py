"""Publish a directory that `convert` created."""

from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from speculators.checkpoint.hub.upload import check_name, check_token, files_of, upload
from speculators.checkpoint.output.stamp import README, is_stamped, stamped
from speculators.convert.provenance import read_record
from speculators.errors import HubError
from speculators.evaluate.report import REPORT_FILE, Report
from speculators.families.card import ANY_DRAFT, ANY_VERIFIER, model_card, names_hub_id
from speculators.families.converted import open_converted
from speculators.publish.figures import evaluation_section, read_report

__all__ = ["Publication", "check_publishing", "plan_publication", "publish_draft"]


@dataclass(frozen=True, slots=True)
class Publication:
    """What is going to be published.

    Attributes:
        directory: what a conversion created.
        card: the model card.
        keeps_card: whether that is one that somebody wrote or edited.
        report: the report to go with it.
        warnings: what a reader of the card could not do, as clauses.

    """

    directory: Path
    card: str
    keeps_card: bool
    report: Report | None
    warnings: list[str]

    @property
    def files(self) -> dict[str, int]:
        """The names of the files that are uploaded, and their sizes in bytes."""
        sizes = {it: (self.directory / it).stat().st_size for it in files_of(self.directory)}
        sizes[README] = len(self.card.encode())
        if self.report is not None:
            sizes[REPORT_FILE] = len(_written(self.report).encode())
        return dict(sorted(sizes.items()))


def check_publishing(
    repo_id: str,
    report: Path | None,
    *,
    directory: Path | None = None,
    revision: str | None = None,
    with_token: bool = True,
) -> None:
    """Check what can be checked before a draft is published, without the network.

    What the user named comes first, and the access token last.

    Args:
        repo_id: the id of the repository.
        report: what `speculators evaluate` wrote.
        directory: the draft, if it is there already.
        revision: the branch.
        with_token: whether a token is needed.

    Raises:
        HubError: if a name is invalid, there is no access token, or offline mode is on.
        FormatError, CheckpointError: if the directory is not a converted draft.
        EvaluationError: if the report cannot be read or is not one.

    """
    check_name(repo_id, revision)
    if directory is not None:
        open_converted(directory)
    if report is not None:
        read_report(report)
    if with_token:
        check_token(repo_id)


def plan_publication(directory: Path, repo_id: str, *, report: Path | None = None) -> Publication:
    """Find out what would be published, without writing anything.

    Args:
        directory: what a conversion created.
        repo_id: the id of the repository.
        report: what `speculators evaluate` wrote, for the card; the one in the directory if not
            given.

    Raises:
        FormatError, CheckpointError: if it is not a converted draft.
        EvaluationError: if the report cannot be read or is not one.

    """
    converted = open_converted(directory)
    warnings = []
    found = None
    if report is not None:
        found = read_report(report)
        if found.draft != repo_id and Path(found.draft).resolve() != directory.resolve():
            warnings.append(f"The report is about {found.draft}: make sure that it is {directory}")
    elif (directory / REPORT_FILE).is_file():
        found = read_report(directory / REPORT_FILE)
    verifier = converted.config.speculators_config.verifier.name_or_path
    if verifier is None or not names_hub_id(verifier):
        warnings.append(
            f"The verifier is not named by a Hugging Face id but by {verifier}: whoever downloads "
            f"{repo_id} has to say which it is, and the card has {ANY_VERIFIER} in its place"
        )
    file = directory / README
    theirs = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    if theirs is not None and not is_stamped(theirs):
        warnings.append(f"{file} was written or edited by somebody, and is published as it is")
        if ANY_DRAFT in theirs:
            warnings.append(f"{file} still has {ANY_DRAFT} in it: write {repo_id} in its place")
        return Publication(directory, theirs, True, found, warnings)
    card = model_card(
        repo_id,
        converted.family,
        converted.config,
        parameters=converted.parameters,
        features=converted.features,
        record=read_record(directory),
        evaluation=evaluation_section(found) if found else None,
    )
    return Publication(directory, stamped(card), False, found, warnings)


def publish_draft(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    report: Path | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
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
        revision: the branch, created if it does not exist; ``main`` if not given.
        commit_message: the first line of the commit message; a standard one if not given.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The URL of the commit or pull request.

    Raises:
        FormatError, CheckpointError: if it is not a converted draft.
        EvaluationError: if the report cannot be read or is not one.
        HubError: if the upload fails; the directory is complete all the same.

    """
    publication = plan_publication(directory, repo_id, report=report)
    for warning in publication.warnings:
        logger.warning(warning)
    if publication.report is not None:
        (directory / REPORT_FILE).write_text(_written(publication.report), encoding="utf-8")
    if not publication.keeps_card:
        (directory / README).write_text(publication.card, encoding="utf-8")
    try:
        url = upload(
            directory,
            repo_id,
            private=private or None,
            revision=revision,
            message=commit_message,
            create_pr=create_pr,
        )
    except HubError as error:
        raise HubError(
            f"{error} The draft in {directory} is complete; publish it later: "
            f"speculators publish {directory} {repo_id}"
        ) from error.__cause__
    logger.success(f"Published at: {url}")
    return url


def _written(report: Report) -> str:
    return report.model_dump_json(indent=2) + "\n"
