"""Files of a new directory that are those of another one: linked, or copied where that fails."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from speculators.checkpoint.identity import FileIdentity, open_unchanged

__all__ = ["copy", "link_or_copy"]

COPY_BYTES = 1 << 28


def link_or_copy(source: Path, target: Path, identity: FileIdentity | None = None) -> None:
    """Give a file a second name; where the file system has no room for that, copy it.

    Symlinks are followed: what is linked is the file that they lead to.

    Args:
        source: the file.
        target: the new name; nothing may be there.
        identity: what the file was when it was first read; see ``open_unchanged``.

    Raises:
        CheckpointError: if the file changed since.
        OSError: if it cannot be copied either.

    """
    try:
        with open_unchanged(source, identity):
            os.link(source.resolve(), target)
    except OSError:  # another file system, one without links, or somebody else's file
        copy(source, target, identity)


def copy(source: Path, target: Path, identity: FileIdentity | None = None) -> None:
    """Copy a file; the kernel shares the blocks of the two if the file system can.

    Raises: as ``link_or_copy``.
    """
    with open_unchanged(source, identity) as read, target.open("xb", buffering=0) as written:
        with suppress(OSError, AttributeError):
            while os.copy_file_range(read.fileno(), written.fileno(), COPY_BYTES):
                pass
        shutil.copyfileobj(read, written, COPY_BYTES >> 6)
