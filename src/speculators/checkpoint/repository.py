"""Where a checkpoint's files come from: a local directory, or a repository on the Hub.

Both answer one question, "where is the file of this name?". Readers ask only for the files they
need, so a Hub repository is never downloaded whole.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from loguru import logger

from speculators.errors import CheckpointError

__all__ = ["LocalDirectory", "Repository", "looks_like_a_path", "open_repository"]


class Repository(Protocol):
    """A named set of files."""

    name: str
    """What the user called it: a path or a Hub id."""

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


class LocalDirectory:
    """A local directory, or one weight file with the files beside it."""

    def __init__(self, path: Path, weights: str | None = None) -> None:
        self.path = path
        self.weights = weights
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


def open_repository(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    one_file: bool = False,
) -> Repository:
    """Open ``source``, which is a local directory or a Hub id.

    A ``revision`` of a local directory is ignored, with a warning.

    Args:
        source: a path, or a Hub id.
        revision: a branch, tag or commit, on the Hub.
        cache_dir: where downloads are kept; the Hub client's default cache if not given.
        one_file: whether ``source`` may also be a weight file, read with the files beside it.

    Raises:
        CheckpointError: if it looks like a path but does not exist, or is a file but has to be a
            directory.

    """
    path = Path(source).expanduser()
    if path.exists() and revision is not None:
        logger.warning(f"{path} is on this machine, so the revision {revision} is ignored")
    if path.is_dir():
        return LocalDirectory(path)
    if path.is_file() and one_file:
        return LocalDirectory(path.parent, path.name)
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json.")
    if isinstance(source, Path) or looks_like_a_path(source):
        raise CheckpointError(f"{path} does not exist; give a directory, or a Hugging Face id.")

    from speculators.checkpoint.hub.repository import HubRepository

    return HubRepository(source, revision=revision, cache_dir=cache_dir)


def looks_like_a_path(source: str) -> bool:
    """Whether ``source`` cannot be a Hub id.

    A Hub id is ``name`` or ``organisation/name``, without a leading dot, slash or tilde.
    """
    return source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1
