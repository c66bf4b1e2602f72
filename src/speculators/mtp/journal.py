"""The journal of a graft in place: what it moves, for the next one if it is killed.

Two files cannot be replaced in one step. A graft that changes config.json does so just before the
index takes its place, and keeps the old text beside it. Whether the index names the new shards
decides: if it does, what is old goes, and if not, what is new goes and the old texts come back.
"""

import fcntl
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from speculators.checkpoint.files.json_file import read_json
from speculators.errors import OutputError
from speculators.mtp.config import write_json

__all__ = ["INDEX", "JOURNAL", "clear_up", "half_done", "kept", "locked", "settle", "write_journal"]

INDEX = "model.safetensors.index.json"

JOURNAL = ".speculators-graft.json"
"""Its name in the verifier. It is locked while the graft is going on."""


def write_journal(
    folder: Path, new: Collection[str], old: Collection[str], texts: Collection[str]
) -> None:
    """Write a journal.

    Args:
        folder: where to.
        new: the shards that are moved in.
        old: those that the new index does not name.
        texts: the JSON files that change.

    """
    write_json(folder / JOURNAL, {"new": [*new], "old": [*old], "texts": [*texts]})


def kept(name: str) -> str:
    """Under which name the old text of a file is kept."""
    return f".speculators-graft-{name}"


def half_done(directory: Path) -> str | None:
    """What is wrong with a verifier in which a graft was killed between config.json and the index.

    Returns:
        a clause that follows its name; ``None`` if nothing is.

    Raises:
        CheckpointError: if the journal or the index cannot be read.

    """
    if not (directory / JOURNAL).is_file():
        return None
    journal = read_json(directory / JOURNAL)
    changed = [
        name
        for name in _names(journal, "texts")
        if (directory / kept(name)).is_file()
        and (directory / kept(name)).read_bytes() != (directory / name).read_bytes()
    ]
    if not changed or _is_finished(directory, journal):
        return None
    return (
        f"was left by a graft in place that was stopped: its {' and '.join(changed)} may not fit "
        "its weights; repeat `speculators mtp graft --in-place`, which puts that right first"
    )


def clear_up(directory: Path) -> None:
    """Settle what an earlier graft in place has left that was killed.

    Raises:
        CheckpointError: if its journal or the verifier's index cannot be read.
        OutputError: if that graft is still going on, or files cannot be moved or removed.

    """
    journal = directory / JOURNAL
    if not journal.is_file():
        return
    try:
        with journal.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            settle(directory)
    except BlockingIOError as error:
        raise OutputError(f"Another graft is changing {directory}; wait for it.") from error
    except OSError as error:
        raise OutputError(f"{directory} cannot be written to: {error.strerror}.") from error


def settle(directory: Path) -> None:
    """Remove what is old if the index is the new one; otherwise undo all. The journal goes last.

    Raises:
        CheckpointError: if the journal or the index cannot be read.
        OSError: if files cannot be moved or removed.

    """
    journal = read_json(directory / JOURNAL)
    finished = _is_finished(directory, journal)
    for name in _names(journal, "texts"):
        if finished:
            (directory / kept(name)).unlink(missing_ok=True)
        elif (directory / kept(name)).is_file():
            (directory / kept(name)).replace(directory / name)
    for name in _names(journal, "old" if finished else "new"):
        if name.endswith(".safetensors"):
            (directory / name).unlink(missing_ok=True)
    (directory / JOURNAL).unlink()


@contextmanager
def locked(journal: Path) -> Iterator[None]:
    """Keep a journal locked, also where it is moved to."""
    with journal.open() as opened:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _names(journal: Mapping[str, Any], key: str) -> list[str]:
    return [Path(name).name for name in journal.get(key, [])]


def _is_finished(directory: Path, journal: Mapping[str, Any]) -> bool:
    """Whether the index names the new shards."""
    index = directory / INDEX
    named = read_json(index).get("weight_map", {}).values() if index.is_file() else ()
    return {*_names(journal, "new")} <= {*named}
