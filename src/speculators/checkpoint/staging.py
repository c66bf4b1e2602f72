"""A directory that appears complete or not at all.

Everything is written into a sibling of the output, whose name tells what it is. The sibling is
synced and takes the output's place in one step; a run that was killed leaves at most a sibling,
which the next run to the same output removes.
"""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from speculators.errors import OutputError

__all__ = ["CONVERTED", "Kind", "check_output", "staged_directory"]

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # from linux/fs.h


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of directory that speculators makes, and how one is known.

    Attributes:
        name: with its article, for messages.
        file: a JSON file in it.
        key: a key that only speculators writes there.

    """

    name: str
    file: str
    key: str


CONVERTED = Kind("a converted checkpoint", "config.json", "speculators_model_type")


def check_output(output: Path, *, overwrite: bool, kind: Kind = CONVERTED) -> None:
    """Check that a directory may be made at ``output``.

    An empty directory may always be replaced; anything else only with ``overwrite``, and only
    if it is of the same ``kind``.

    Raises:
        OutputError: if not.

    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise OutputError(f"{output} exists and is not a directory; choose another output.")
    if not any(output.iterdir()):
        return
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
    output: Path, *, overwrite: bool = False, kind: Kind = CONVERTED
) -> Iterator[Path]:
    """Make ``output`` from a temporary sibling that the ``with`` block fills.

    If the block raises, the sibling is removed and ``output`` stays as it was.

    Raises:
        OutputError: if something is in the way, or the disk does not take it.

    """
    check_output(output, overwrite=overwrite, kind=kind)
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        staging, lock = _make_locked_sibling(output)
    except OSError as error:
        _remove_empty(new_parents)
        raise OutputError(f"{output} cannot be made: {error.strerror or error}.") from error
    try:
        yield staging
        _sync(staging)
        check_output(output, overwrite=overwrite, kind=kind)
        _publish(staging, output)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno is None:
            raise
        raise OutputError(
            f"{output} could not be written: {error.strerror}; "
            "nothing was left there that was not there before."
        ) from error
    finally:
        # After an exchange, what was at the output lies here.
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)
        _remove_empty(new_parents)


def _make_locked_sibling(output: Path) -> tuple[Path, int]:
    """A new directory beside ``output``, locked for as long as this process lives."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        lock = os.open(staging, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if staging.exists():
            staging.chmod(0o777 & ~_umask())
            return staging, lock
        os.close(lock)  # another run took it for a leftover before it was locked


def _remove_leftovers(output: Path) -> None:
    """Remove siblings of runs that were killed: those that no living process has locked."""
    for leftover in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        try:
            lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
            logger.debug(f"Removed {leftover}, left by a run that was stopped")
        except BlockingIOError:
            logger.debug(f"{leftover} belongs to a run that is going on")
        finally:
            os.close(lock)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, the innermost first, until one holds something."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return


def _publish(staging: Path, output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        _exchange(staging, output)
    else:
        staging.rename(output)
    _sync_directory(output.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step, so that neither is ever missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    renamed = getattr(libc, "renameat2", lambda *_: -1)(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    )
    if renamed == 0:
        return
    code = ctypes.get_errno()
    if code not in {0, errno.ENOSYS, errno.EINVAL}:
        raise OSError(code, os.strerror(code), str(other))
    # Not every file system swaps: then there is a moment with the old one under another name.
    aside = Path(tempfile.mkdtemp(prefix=f".{other.name}.old-", dir=other.parent)) / other.name
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
    aside.parent.rmdir()


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(output: Path) -> str:
    return f".{output.name}.speculators-"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
