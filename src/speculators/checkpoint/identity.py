"""Which file was read: what is copied, hashed and proven must be one and the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from speculators.errors import CheckpointError

__all__ = ["FileIdentity", "open_unchanged"]


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file at one moment: which one it is, and when it was last written to.

    Attributes:
        device: the file system.
        inode: the file's number there; another one if the file was replaced.
        size: in bytes.
        mtime_ns: when it was last written to, in nanoseconds.

    """

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, file: Path | int) -> "FileIdentity":
        """The identity of a file, given by its path (links are followed) or its descriptor."""
        status = os.fstat(file) if isinstance(file, int) else file.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@contextmanager
def open_unchanged(path: Path, identity: FileIdentity | None) -> Iterator[BinaryIO]:
    """Open a file, and check before and after that it is the one that was read first.

    Args:
        path: the file.
        identity: what it was then; if not given, what it is now.

    Raises:
        CheckpointError: if it cannot be opened, or was replaced or written to since. This error
            takes the place of one that the ``with`` block raises about a file that changed.

    """
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check it.") from error
    with file:
        known = identity or FileIdentity.at(file.fileno())
        _check(file, known, path)
        try:
            yield file
        finally:
            _check(file, known, path)


def _check(file: BinaryIO, known: FileIdentity, path: Path) -> None:
    now = FileIdentity.at(file.fileno())
    if now == known:
        return
    how = (
        "was replaced"
        if (now.device, now.inode) != (known.device, known.inode)
        else f"was written to (it had {known.size} bytes, and now has {now.size})"
        if now.size != known.size
        else "was written to"
    )
    raise CheckpointError(
        f"{path} {how} after it was first read, so it is not used; run again when nothing changes "
        "it any more."
    )
