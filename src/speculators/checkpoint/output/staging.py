"""A directory that appears complete or not at all.

Everything is written into a sibling of the output, with a name that can be recognised:

    .NAME.speculators-XXXXXXXX/lock    locked while the run that made it is alive
    .NAME.speculators-XXXXXXXX/new     what becomes the output
    .NAME.speculators-XXXXXXXX/old     the previous output, while it is being replaced
    .NAME.speculators-XXXXXXXX/copy    a copy of it, where it cannot be renamed

``new`` is synced and takes the output's place in one step. On a file system that cannot swap two
directories in one step, replacing takes two, and ``old`` keeps the previous output in between. A
directory of a lower layer of an overlay file system (as in a container's image) cannot be renamed
at all: it is copied, removed, and put back from the copy if ``new`` does not get to its place. A
run that is killed leaves at most such a sibling: the next run to the same output puts the previous
output back if need be, and removes the sibling.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from speculators.errors import OutputError, SpeculatorsError, printable

__all__ = [
    "CONVERTED",
    "Marker",
    "check_output",
    "staged_directory",
    "sync",
    "sync_directory",
    "working_directory",
]

LOCK, NEW, OLD, COPY, COPYING = "lock", "new", "old", "copy", "copying"
DIRECTORIES = (NEW, OLD, COPY, COPYING)

MOUNTS = Path("/proc/self/mountinfo")

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
class Marker:
    """What marks a directory as one that speculators made.

    Attributes:
        name: its name with an article, for messages.
        file: a file in it that begins with JSON, or with a header that is.
        key: a key that only speculators writes there.

    """

    name: str
    file: str
    key: str


CONVERTED = Marker("a converted checkpoint", "config.json", "speculators_model_type")

LONGEST_HEADER = 1 << 20


def check_output(output: Path, *, overwrite: bool, marker: Marker | None = CONVERTED) -> None:
    """Check that a directory may be created at ``output``.

    An empty directory may always be replaced; any other only with ``overwrite``, and only if it is
    with the same ``marker``. Without a ``marker``, no other is ever replaced.

    Raises:
        OutputError: if it may not.

    """
    output = _located(output)
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise OutputError(f"{output} exists and is not a directory; choose another output.")
    mounts = _mounts_in(output)
    if output.is_mount() or output.resolve() in mounts:
        raise OutputError(
            f"{output} is where a file system is mounted, so it cannot be replaced; "
            "choose a directory within it."
        )
    if not any(output.iterdir()):
        return
    if marker is None:
        raise OutputError(f"{output} exists; choose another output.")
    if not overwrite:
        raise OutputError(
            f"{output} exists; choose another output, or replace it with --overwrite."
        )
    if not _is_marked(output, marker):
        raise OutputError(
            f"{output} is not {marker.name}, so --overwrite does not replace it; "
            "choose another output."
        )
    if mounts:
        raise OutputError(
            f"{output} holds {mounts[0]}, where a file system is mounted, so it is not replaced; "
            "unmount that, or choose another output."
        )


def _is_marked(directory: Path, marker: Marker) -> bool:
    file = directory / marker.file
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return f'"{marker.key}"'.encode() in opened.read(LONGEST_HEADER)


def _located(output: Path) -> Path:
    """The same place, by a path that ends with its name and does not lead up again."""
    if "\0" in str(output):
        raise OutputError(
            f"{printable(str(output))} contains a NUL character; choose another output."
        )
    if output.name in {"", ".."}:
        return output.resolve()
    return output.parent.resolve() / output.name if ".." in output.parts else output


def _mounts_in(directory: Path) -> list[Path]:
    """Where file systems are mounted at or below a directory, or files and folders are bound.

    The kernel lists them; elsewhere than on Linux, none are found.
    """
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return []
    escaped = (line.split(b" ")[4] for line in lines)
    points = (re.sub(rb"\\(\d{3})", lambda it: bytes([int(it[1], 8)]), point) for point in escaped)
    place = directory.resolve()
    return [path for path in map(Path, map(os.fsdecode, points)) if path.is_relative_to(place)]


@contextmanager
def staged_directory(
    output: Path, *, overwrite: bool = False, marker: Marker | None = CONVERTED
) -> Iterator[Path]:
    """Create ``output`` from a temporary directory that the ``with`` block fills.

    If the block raises, the temporary directory is removed and ``output`` stays as it was.

    Raises:
        OutputError: if something is in the way, or writing fails.

    """
    output = _located(output)
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        sibling, lock = _make_locked_sibling(output)
    except OSError as error:
        _remove_empty(new_parents)
        raise OutputError(f"{output} cannot be made: {error.strerror or error}.") from error
    try:
        check_output(output, overwrite=overwrite, marker=marker)
        staging = sibling / NEW
        staging.mkdir()
        yield staging
        sync(staging)
        check_output(output, overwrite=overwrite, marker=marker)
        _publish(sibling, output, overwrite=overwrite)
        for directory in {output.parent, *(parent.parent for parent in new_parents)}:
            sync_directory(directory)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno is None:
            raise
        advice = ADVICE.get(error.errno, "choose another output if it stays so")
        raise OutputError(
            f"{output} could not be written: {error.strerror}; {advice} "
            "(nothing new was left there)."
        ) from error
    finally:
        _discard(sibling, output, lock)
        _remove_empty(new_parents)


@contextmanager
def working_directory(directory: Path, name: str) -> Iterator[Path]:
    """A temporary directory within ``directory``, for files that are moved out of it one by one.

    It is removed at the end, and so are those that runs of the same ``name`` left that were killed.

    Raises:
        OutputError: if it cannot be made, or an ``OSError`` is raised within the context.

    """
    place = directory / name
    try:
        _remove_leftovers(place)
        sibling, lock = _make_locked_sibling(place)
    except OSError as error:
        raise OutputError(f"{directory} cannot be written to: {error.strerror}.") from error
    try:
        (sibling / NEW).mkdir()
        yield sibling / NEW
    except OSError as error:
        if isinstance(error, SpeculatorsError) or error.errno is None:
            raise
        advice = ADVICE.get(error.errno, "try again, or choose another output")
        raise OutputError(
            f"{directory} could not be changed: {error.strerror}; {advice}."
        ) from error
    finally:
        _discard(sibling, place, lock)


def _make_locked_sibling(output: Path) -> tuple[Path, int]:
    """A new directory beside ``output``, locked for as long as this process lives."""
    while True:
        sibling = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        try:
            lock = os.open(sibling / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
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
    # The names that ``tempfile.mkdtemp`` makes.
    form = re.compile(re.escape(_prefix(output)) + "[a-z0-9_]{8}")
    for leftover in [it for it in output.parent.iterdir() if form.fullmatch(it.name)]:
        try:
            if not _is_ours(leftover):
                logger.debug(f"{leftover} is not ours to remove: it holds something else")
                continue
            lock = os.open(leftover / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            logger.debug(f"{leftover} is not ours to remove: {error.strerror}")
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            logger.debug(f"{leftover} belongs to a run that is going on: {error.strerror}")
            os.close(lock)
        else:
            _discard(leftover, output, lock)
            logger.debug(f"Removed {leftover}, left by a run that was stopped")


def _is_ours(leftover: Path) -> bool:
    """Whether a directory holds what a run leaves, and nothing else.

    An empty one, as a run makes it at its start and leaves it at its end, is removed here.

    Raises:
        OSError: if it cannot be read.

    """
    status = leftover.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    modes = {path.name: path.lstat().st_mode for path in leftover.iterdir()}
    if not modes and stat.S_IMODE(status.st_mode) == 0o700:
        leftover.rmdir()
    return stat.S_ISREG(modes.pop(LOCK, 0)) and all(
        name in DIRECTORIES and stat.S_ISDIR(mode) for name, mode in modes.items()
    )


def _discard(sibling: Path, output: Path, lock: int) -> None:
    """Remove a sibling; put the previous output back first if nothing has taken its place.

    The lock goes last, since what has none is not taken for a leftover.
    """
    old, copy = sibling / OLD, sibling / COPY
    if old.exists() and not output.exists():
        old.rename(output)
        logger.warning(f"{output} is as it was: the run that was to replace it was stopped")
    elif copy.exists() and (sibling / NEW).exists() and _is_part_of(output, copy):
        shutil.rmtree(output, ignore_errors=True)
        copy.rename(output)
        logger.warning(f"{output} is as it was: the run that was to replace it was stopped")
    # After a replacement, the previous output is where the new one was, and goes with the sibling.
    left: list[OSError] = []
    for name in DIRECTORIES:
        if (sibling / name).exists():
            left += _remove_tree(sibling / name)
    if left:
        logger.warning(
            f"{sibling} could not be removed completely ({left[0].strerror}: {left[0].filename}): "
            f"what is left there was a part of {output}; remove it yourself"
        )
        os.close(lock)
        return
    with suppress(OSError):
        (sibling / LOCK).unlink()
    os.close(lock)  # before the directory goes: on NFS, an open file stays in it
    with suppress(OSError):
        sibling.rmdir()


def _remove_tree(directory: Path) -> list[OSError]:
    """Remove as much as possible; return the errors."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        try:
            shutil.rmtree(directory)
        except OSError as error:
            return [error]
    return []


def _is_part_of(output: Path, copy: Path) -> bool:
    """Whether everything that is left of a directory is in its copy."""
    return all(os.path.lexists(copy / it.relative_to(output)) for it in output.rglob("*"))


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
    new, old = sibling / NEW, sibling / OLD
    if not overwrite or not output.exists():
        new.rename(output)
        return
    try:
        if _exchange(new, output):
            return
        output.rename(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _replace_by_copy(sibling, output)
        return
    new.rename(output)
    old.rename(new)  # a half-removed directory must not be put back


def _replace_by_copy(sibling: Path, output: Path) -> None:
    """Replace a directory that cannot be renamed; see the top of this module."""
    shutil.copytree(output, sibling / COPYING, symlinks=True)
    (sibling / COPYING).rename(sibling / COPY)
    if errors := _remove_tree(output):
        raise errors[0]
    (sibling / NEW).rename(output)


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


def sync(directory: Path) -> None:
    """Bring the files of a directory and of its folders to the disk."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Bring the names of a directory's files to the disk."""
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
