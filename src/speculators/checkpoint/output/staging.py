"""A directory that appears complete or not at all.

Everything is written into a sibling of the output, with a name that can be recognised:

    .NAME.speculators-XXXXXXXX/lock    locked while the run that made it is alive
    .NAME.speculators-XXXXXXXX/new     what becomes the output
    .NAME.speculators-XXXXXXXX/old     the previous output, while it is being replaced

``new`` is synced and takes the output's place in one step. On a file system that cannot swap two
directories in one step, replacing takes two, and ``old`` keeps the previous output in between. A
run that is killed leaves at most such a sibling: the next run to the same output puts the previous
output back if there is none, and removes the sibling.
"""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from speculators.errors import OutputError

__all__ = ["CONVERTED", "Kind", "check_output", "staged_directory"]

LOCK, NEW, OLD = "lock", "new", "old"

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # from linux/fs.h

ADVICE = {
    errno.ENOSPC: "make room there, or choose another output",
    errno.EDQUOT: "make room in the quota, or choose another output",
    errno.ENOTEMPTY: "something else was put there meanwhile: choose another output",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another output",
}
"""errno → what to do about the error."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of directory that speculators makes, and how to recognise one.

    Attributes:
        name: its name with an article, for messages.
        file: a JSON file in it.
        key: a key that only speculators writes there.

    """

    name: str
    file: str
    key: str


CONVERTED = Kind("a converted checkpoint", "config.json", "speculators_model_type")


def check_output(output: Path, *, overwrite: bool, kind: Kind | None = CONVERTED) -> None:
    """Check that a directory may be created at ``output``.

    An empty directory may always be replaced; any other only with ``overwrite``, and only if it is
    of the same ``kind``. Without a ``kind``, no other is ever replaced.

    Raises:
        OutputError: if it may not.

    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise OutputError(f"{output} exists and is not a directory; choose another output.")
    if output.is_mount():
        raise OutputError(
            f"{output} is where a file system is mounted, so it cannot be replaced; "
            "choose a directory within it."
        )
    if not any(output.iterdir()):
        return
    if kind is None:
        raise OutputError(f"{output} exists; choose another output.")
    if not overwrite:
        raise OutputError(
            f"{output} exists; choose another output, or replace it with --overwrite."
        )
    marker = output / kind.file
    if not marker.is_file() or f'"{kind.key}"'.encode() not in marker.read_bytes():
        raise OutputError(
            f"{output} is not {kind.name}, so --overwrite does not replace it; "
            "choose another output."
        )


@contextmanager
def staged_directory(
    output: Path, *, overwrite: bool = False, kind: Kind | None = CONVERTED
) -> Iterator[Path]:
    """Create ``output`` from a temporary directory that the ``with`` block fills.

    If the block raises, the temporary directory is removed and ``output`` stays as it was.

    Raises:
        OutputError: if something is in the way, or writing fails.

    """
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        sibling, lock = _make_locked_sibling(output)
    except OSError as error:
        _remove_empty(new_parents)
        raise OutputError(f"{output} cannot be made: {error.strerror or error}.") from error
    try:
        check_output(output, overwrite=overwrite, kind=kind)
        staging = sibling / NEW
        staging.mkdir()
        yield staging
        _sync(staging)
        check_output(output, overwrite=overwrite, kind=kind)
        _publish(sibling, output, overwrite=overwrite)
        for directory in {output.parent, *(parent.parent for parent in new_parents)}:
            _sync_directory(directory)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno is None:
            raise
        advice = ADVICE.get(error.errno, "choose another output if it stays so")
        raise OutputError(
            f"{output} could not be written: {error.strerror}; {advice} "
            "(nothing was left there that was not there before)."
        ) from error
    finally:
        _discard(sibling, output)
        os.close(lock)
        _remove_empty(new_parents)


def _make_locked_sibling(output: Path) -> tuple[Path, int]:
    """A new directory beside ``output``, locked for as long as this process lives."""
    while True:
        sibling = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        try:
            lock = _open_lock(sibling)
        except FileNotFoundError:
            continue  # another run took it for a leftover
        # Some network file systems have no locks: there, leftovers are never removed.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return sibling, lock
        os.close(lock)  # another run took it for a leftover before it was locked


def _remove_leftovers(output: Path) -> None:
    """Clean up after runs that were killed: remove siblings that no living process has locked."""
    for leftover in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        try:
            lock = _open_lock(leftover)
        except OSError as error:
            logger.debug(f"{leftover} is not ours to remove: {error.strerror}")
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            logger.debug(f"{leftover} belongs to a run that is going on: {error.strerror}")
        else:
            _discard(leftover, output)
            logger.debug(f"Removed {leftover}, left by a run that was stopped")
        finally:
            os.close(lock)


def _open_lock(sibling: Path) -> int:
    return os.open(sibling / LOCK, os.O_RDWR | os.O_CREAT, 0o600)


def _discard(sibling: Path, output: Path) -> None:
    """Remove a sibling; put the previous output back first if nothing has taken its place."""
    old = sibling / OLD
    if old.exists() and not output.exists():
        old.rename(output)
        logger.warning(f"{output} is as it was: the run that was to replace it was stopped")
    # After a replacement, the previous output is where the new one was, and goes with the sibling.
    shutil.rmtree(sibling, ignore_errors=True)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, the innermost first, until one is not empty."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return


def _publish(sibling: Path, output: Path, *, overwrite: bool) -> None:
    """Move the new directory to ``output``.

    Renaming a directory replaces at most an empty one, so what another process has put there
    meanwhile is not lost.
    """
    new = sibling / NEW
    if overwrite and output.exists():
        if _exchange(new, output):
            return
        old = sibling / OLD
        output.rename(old)
        new.rename(output)
        old.rename(new)  # a half-removed directory must not be put back
    else:
        new.rename(output)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, so that neither is ever missing.

    Returns:
        Whether it was done; not every file system can.

    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if (
        libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
        == 0
    ):
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL}:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EBADF}:  # not every file system can sync one
            raise
    finally:
        os.close(descriptor)


def _prefix(output: Path) -> str:
    return f".{output.name}.speculators-"
