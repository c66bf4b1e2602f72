"""Upload a converted draft to the Hugging Face Hub, in one commit.

The Hub's own client does the work. Added here: a repository that holds something else is left
alone, a model card that somebody wrote is not replaced, what is meant to be private does not become
public, and every failure is reported in one sentence.
"""

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from loguru import logger

from speculators.checkpoint.hub.client import watched_client
from speculators.checkpoint.hub.errors import raise_hub_error
from speculators.checkpoint.output.staging import CONVERTED
from speculators.checkpoint.output.stamp import README, is_stamped
from speculators.errors import HubError, printable

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

__all__ = ["FILES", "SAVED", "check_name", "check_token", "check_upload", "files_of", "upload"]

SAVED = (
    "config.json",
    README,
    "model*.safetensors",
    "model*.index.json",
    "mask_embedding.pt",
)
"""The files of a draft; the last one, which some DFlash drafts have, is beside the weights."""

FILES = (*SAVED, "conversion.json", "report.json")
"""The files of a draft that was converted, and perhaps evaluated."""

BRANCH = re.compile(r"(?!/|.*(?:\.\.|//|@\{|\.lock$|[/.]$))[^\x00-\x20\x7f~^:?*\[\\]+")
"""A name that git allows for a branch (git-check-ref-format), but for details."""

_NO_TOKEN = (
    "Uploading to {repo} needs an access token: log in with 'hf auth login', or set HF_TOKEN to a"
    " token with the role 'write'"
)

# What can go wrong: a name that ``hub_errors.kinds_of`` gives an error → the message.
_SENTENCES = {
    "HFValidationError": (
        "{repo!r} is not a Hub id, so nothing can be uploaded there: give one such as"
        " 'organization/name'"
    ),
    "LocalTokenNotFoundError": _NO_TOKEN,
    "HTTP 401": _NO_TOKEN,
    "HTTP 401, token sent": (
        "{endpoint} rejects the access token: set HF_TOKEN to a valid one, or log in again with"
        " 'hf auth login'"
    ),
    "HTTP 403": (
        "{endpoint} does not let the access token write {repo} ({reason}): use one with the role"
        " 'write' of an account that may, or choose another repository"
    ),
    "HTTP 412": "{repo} was changed by somebody else while it was uploaded to: try again",
    "HTTP 429": "{endpoint} has had too many requests from here ({reason}): wait some minutes",
    "LongWaitError": "{endpoint} asks to wait for {reason} before it takes more: try again then",
    "HTTP 5xx": "{endpoint} fails to take the files for {repo} ({reason}): try again later",
    "HfHubHTTPError": (
        "{endpoint} does not take the files for {repo} ({reason}): check the id, the access token"
        " and HF_ENDPOINT"
    ),
    "HTTPError": (
        "{repo} cannot be uploaded to {endpoint} ({reason}): check the network, the proxy and"
        " HF_ENDPOINT"
    ),
    "OfflineModeIsEnabled": "Offline mode forbids uploading to {repo}: unset HF_HUB_OFFLINE",
    # Of all that is sent, only the token is not encoded beforehand.
    "UnicodeEncodeError": (
        "The access token holds characters that cannot be sent: set HF_TOKEN to the token as"
        " {endpoint}/settings/tokens shows it"
    ),
    "errno": "The files for {repo} cannot be read ({reason}): check the disk",
    "Exception": (
        "{repo} cannot be uploaded to {endpoint} ({kind}: {reason}): check the id and the HF_*"
        " environment variables"
    ),
}


def check_name(repo_id: str, revision: str | None = None) -> None:
    """Check the names of a repository and of a branch, without the network.

    Args:
        repo_id: ``organization/name``, or ``name`` for a repository of the token's owner.
        revision: a branch.

    Raises:
        HubError: if one of them cannot be one.

    """
    from huggingface_hub.utils import validate_repo_id

    with _errors_explained(repo_id):
        validate_repo_id(repo_id)
    if revision is not None and not BRANCH.fullmatch(revision):
        raise HubError(
            f"{printable(revision)!r} cannot be the name of a branch: give one such as 'main' or "
            "'v2'."
        )


def check_token(repo_id: str, token: bool | str | None = None) -> None:
    """Check that there is an access token and the Hub may be used, without the network.

    Args:
        repo_id: the repository, for the message.
        token: an access token; the one that the Hub's client finds if not given.

    Raises:
        HubError: if not.

    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    with _errors_explained(repo_id):
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        if token in {None, True} and not get_token():
            raise LocalTokenNotFoundError


def check_upload(
    repo_id: str, *, revision: str | None = None, token: bool | str | None = None
) -> None:
    """Check what can be checked before there is anything to upload, first the names.

    Raises:
        HubError: as ``check_name`` and ``check_token``.

    """
    check_name(repo_id, revision)
    check_token(repo_id, token)


def files_of(directory: Path, patterns: Collection[str] = FILES) -> set[str]:
    """The names of the files in a directory that belong to a draft and are uploaded."""
    return {path.name for pattern in patterns for path in directory.glob(pattern)}


def upload(
    directory: Path,
    repo_id: str,
    *,
    message: str | None = None,
    description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    files: Collection[str] = FILES,
) -> str:
    """Upload the files of a converted draft, in one commit: all of them, or none.

    Other files in the directory are not uploaded. A file that the repository already has is not
    sent again, and a file of an earlier draft that this one lacks is deleted there. A model card
    that speculators wrote does not replace one that somebody wrote or edited.

    Args:
        directory: the draft.
        repo_id: ``organization/name``, or ``name`` for a repository of the token's owner; it is
            created if needed.
        message: the first line of the commit message; a standard one if not given.
        description: the rest of the commit message.
        private: whether a new repository is private (the Hub's default if not given); with
            ``True``, an existing public one is refused.
        token: an access token; the one that the Hub's client finds if not given.
        revision: the branch, created if needed; ``main`` if not given.
        create_pr: open a pull request instead of committing to the branch.
        files: patterns of the files that belong to the draft.

    Returns:
        The URL of the commit or pull request.

    Raises:
        HubError: if it fails. Then nothing has changed, except that an empty repository or branch
            may have been created.

    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_upload(repo_id, revision=revision, token=token)
    api = HfApi(token=True if token is None else token, library_name="speculators")
    with _errors_explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
    if private and not there.private:
        raise HubError(
            f"{repo_id} exists and is public, so nothing was uploaded: make it private in its "
            "settings, choose another repository, or leave private out."
        )
    kept = _find_kept(api, there, directory)
    added = files_of(directory, files) - kept
    names = {file.rfilename for file in there.siblings or ()}
    stale = {name for name in names if any(fnmatch(name, it) for it in FILES)} - added - {README}
    with _errors_explained(repo_id):
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, directory / name) for name in sorted(added)),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=message or "Upload a draft",
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,
        )
    if commit.oid == there.sha:
        logger.info(f"{repo_id} has all of it already")
    return commit.pr_url or commit.commit_url


@contextmanager
def _errors_explained(repo_id: str) -> Iterator[None]:
    """Run the client quietly, and turn what it raises into a sentence."""
    try:
        with watched_client(), _client_kept_quiet():
            yield
    except Exception as error:  # the client lets errors of many libraries through
        raise_hub_error(error, _SENTENCES, repo=repo_id)


@contextmanager
def _client_kept_quiet() -> Iterator[None]:
    """Keep the client from drawing bars into a log, and from logging warnings of its own."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.ERROR)
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _find_kept(api: "HfApi", there: "ModelInfo", directory: Path) -> set[str]:
    """Find which files on the Hub to keep: a model card that somebody wrote or edited.

    Raises:
        HubError: if the repository holds something other than a converted draft.

    """
    names = {CONVERTED.file, README} & {file.rfilename for file in there.siblings or ()}
    with _errors_explained(there.id), TemporaryDirectory() as folder:
        texts = {
            name: Path(
                api.hf_hub_download(there.id, name, revision=there.sha, local_dir=folder)
            ).read_text(encoding="utf-8", errors="replace")
            for name in names
        }
    if CONVERTED.file in texts and f'"{CONVERTED.key}"' not in texts[CONVERTED.file]:
        raise HubError(
            f"{there.id} holds a model that is not a converted draft, so nothing was uploaded: "
            "choose another repository."
        )
    if README not in texts or is_stamped(texts[README]):
        return set()
    ours = directory / README
    if not ours.is_file() or not is_stamped(ours.read_text(encoding="utf-8", errors="replace")):
        return set()
    logger.info(f"The {README} of {there.id} was edited there, and is kept")
    return {README}
