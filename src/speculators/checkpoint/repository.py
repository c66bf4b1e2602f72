"""Where a checkpoint's files come from: a local directory, or a repository on the Hub.

Both answer one question, "where is the file of this name?". Readers ask only for the files they
need, so a Hub repository is never downloaded whole.
"""

import os
import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Protocol

from loguru import logger

from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.paths import local_path, meant_path
from speculators.errors import CheckpointError, printable

__all__ = ["LocalDirectory", "Repository", "looks_like_a_path", "open_repository"]

MAX_NAMES = 2000


CREDENTIALS = re.compile(r"(?<=//)[^/\s]*(?=@)")

_ID = r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)"
HUB_URL = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/|hf:/+)(?:models/)?"
    rf"(?!datasets/|spaces/){_ID}(?:@(?P<at>[^/]+))?"
    r"(?:/(?:(?P<file>blob|resolve)|tree)/(?P<revision>[^/?#]+))?"
    r"(?:/(?P<folder>[^?#]*[^?#/]))?/?(?:[?#].*)?"
)
HUB_FOLDER = re.compile(rf"{_ID}/(?P<folder>[\w./-]*\w)/?", re.ASCII)
"""A path that could be a folder of a repository, looked at if there is no such path here."""


class Repository(Protocol):
    """A named set of files."""

    name: str
    """What the user called it: a path or a Hub id."""

    hub: HubAccess
    """How to open what its files name."""

    weights: str | None
    """The weight file, or index of several, that the user named; else ``None``."""

    @property
    def commit(self) -> str | None:
        """The commit that files come from; ``None`` for a directory, and before the first file."""

    def file(self, filename: str) -> Path | None:
        """The local path of ``filename``, or ``None`` if the repository has no such file."""

    def part(self, filename: str, tensors: Collection[str]) -> Path | None:
        """A local file with those of ``tensors`` that the safetensors file ``filename`` holds.

        It may hold more. ``None`` if the repository has no such file.
        """

    def holds(self, filename: str) -> bool:
        """Whether the repository has ``filename``; never downloads it."""

    def names(self) -> list[str]:
        """The files in it and in its folders, with ``/`` between them; folders end with it."""

    def unseen(self) -> str | None:
        """Why a file that is missing may exist all the same, and what to do; else ``None``."""


class LocalDirectory:
    """A local directory, or one weight file with the files beside it."""

    def __init__(
        self, path: Path, weights: str | None = None, hub: HubAccess = DEFAULT_ACCESS
    ) -> None:
        self.path = path
        self.weights = weights
        self.hub = hub
        self.name = str(path / (weights or ""))
        self.commit: str | None = None

    def file(self, filename: str) -> Path | None:
        """See ``Repository``."""
        path = self.path / filename
        return path if path.is_file() else None

    def part(self, filename: str, tensors: Collection[str]) -> Path | None:  # noqa: ARG002
        """See ``Repository``."""
        return self.file(filename)

    def holds(self, filename: str) -> bool:
        """See ``Repository``."""
        return (self.path / filename).is_file()

    def names(self) -> list[str]:
        """See ``Repository``; two levels deep, and not more than some thousands."""
        found: list[str] = []
        for pattern in ("*", "*/*"):
            for path in islice(self.path.glob(pattern), MAX_NAMES):
                name = path.relative_to(self.path).as_posix()
                found.append(f"{name}/" if path.is_dir() else name)
        return found

    def unseen(self) -> str | None:
        """See ``Repository``."""
        return None


def open_repository(
    source: str | os.PathLike[str],
    hub: HubAccess = DEFAULT_ACCESS,
    *,
    revision: str | None = None,
    one_file: bool = False,
) -> Repository:
    """Open ``source``, which is a local directory or a Hub id.

    A ``revision`` of a local directory is ignored, with a warning. There is a warning, too, if what
    could be a Hub id is nearly the path of something here, or if its first part is a directory
    here. A name without an organization, which every model on the Hub has today, is an error if it
    is nearly that of something here.

    Args:
        source: a path, or a Hub id.
        hub: the cache and the token, for it and what is opened after it.
        revision: a branch, tag or commit, on the Hub.
        one_file: whether ``source`` may also be a weight file, read with the files beside it.

    Raises:
        CheckpointError: if it looks like a path but does not exist, or is a file but has to be a
            directory.

    """
    source = source if isinstance(source, str) else Path(source)
    if source == "":
        # As a path, it would be the current directory.
        raise CheckpointError("No name is given; give a directory, or a Hugging Face id.")
    path = local_path(source)
    if path.exists() and revision is not None:
        logger.warning(f"{path} is on this machine, so the revision {revision} is ignored")
    if path.is_dir():
        return LocalDirectory(path, hub=hub)
    if path.is_file() and one_file:
        return LocalDirectory(path.parent, path.name, hub)
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json.")
    if isinstance(source, str) and (advice := _say_what_is_meant(source)):
        raise CheckpointError(advice)
    if isinstance(source, Path) or looks_like_a_path(source):
        raise CheckpointError(
            f"{path} does not exist{meant_path(path)}; give a directory, or a Hugging Face id."
        )
    meant = meant_path(path)
    if meant and "/" not in source:
        raise CheckpointError(
            f"{path} does not exist here{meant}; for a model on the Hub, give its whole id, "
            f"such as organization/{path}."
        )
    if meant or ("/" in source and path.parent.is_dir()):
        logger.warning(f"{path} does not exist here{meant}: it is taken for a Hugging Face id")

    from speculators.checkpoint.hub.repository import HubRepository

    return HubRepository(source, hub, revision=revision)


def _say_what_is_meant(source: str) -> str | None:
    """What to give instead of a URL, or of a folder of a repository on the Hub."""
    shown = printable(CREDENTIALS.sub("***", source))
    if match := HUB_URL.fullmatch(source):
        revision = match["revision"] or match["at"]
        option = f" with --revision {revision}" if revision not in {None, "main"} else ""
        folder = match["folder"] or ""
        if match["file"]:
            folder = folder.rpartition("/")[0]
        if folder:
            return f"{shown} is a URL; {_get_folder(match['repo'], folder)}."
        return f"{shown} is a URL; give the id {match['repo']}{option}."
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", source):
        return f"{shown} is a URL; download what it leads to, and give the directory."
    if match := HUB_FOLDER.fullmatch(source):
        return (
            f"{source} does not exist; give a directory, or a Hugging Face id (if the folder "
            f"{match['folder']} of the repository {match['repo']} is meant, "
            f"{_get_folder(match['repo'], match['folder'])})."
        )
    return None


def _get_folder(repo: str, folder: str) -> str:
    command = f"hf download {repo} --include '{folder}/*' --local-dir DIR"
    return f"get it with `{command}`, and give DIR/{folder}"


def looks_like_a_path(source: str) -> bool:
    """Whether ``source`` cannot be a Hub id.

    A Hub id is ``name`` or ``organisation/name``, without a leading dot, slash or tilde.
    """
    return source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1
