"""Files in the cache of the Hub's client: that they are in it, and hold what the Hub announced."""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["OutsideError", "check_place", "delete_cached", "find_damage"]

CHUNK_BYTES = 1 << 20


class OutsideError(Exception):
    """A path that the client returned does not lie in the cache; the message is where it does."""


def check_place(path: Path, cache: Path, folder: Path) -> None:
    """Check that a path, which is partly made of what a server says, is in the cache.

    Args:
        path: what the client returned.
        cache: the cache.
        folder: the repository's folder in it.

    Raises:
        OutsideError: if not.

    """
    # As written: the client follows links in the cache's own path, and others are looked at next.
    written = Path(os.path.normpath(path.absolute()))
    snapshots = [it / folder.name / "snapshots" for it in (cache.absolute(), cache.resolve())]
    if not any(written.is_relative_to(os.path.normpath(place)) for place in snapshots):
        raise OutsideError(str(written))
    # The user may have put the cache, the repository or its blobs elsewhere by a link.
    places = [place.resolve() for place in (cache, folder, folder / "blobs")]
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise OutsideError(str(path.resolve()))


def find_damage(path: Path, notes: Path) -> str | None:
    """Compare a cached file with the hash that the Hub announced.

    A cached file is a link to ``blobs/<ETag>``. The ETag is the SHA-256 of a file in large-file
    storage, and the hash that git gives any other. Nothing is compared if the ETag is no such hash
    (mirrors may send anything), nor in a cache without links, which does not keep it.

    Args:
        path: the cached file.
        notes: a folder, in which it is noted that a file was found right: it is not hashed again
            until it changes.

    Returns:
        The kind of hash by which it differs; ``None`` if it is right, or cannot be compared.

    """
    if not path.is_symlink():
        return None
    blob = path.parent / path.readlink()
    kind = HASHES.get(len(blob.name)) if re.fullmatch("[0-9a-f]+", blob.name) else None
    if kind is None:
        return None
    now = blob.stat()
    state = f"{now.st_ino} {now.st_size} {now.st_mtime_ns}"
    note = notes / hashlib.sha256(os.fsencode(blob.resolve())).hexdigest()
    with suppress(OSError):
        if note.read_text() == state:
            return None
    if blob.name not in kind.digests(blob):
        return kind.name
    with suppress(OSError):  # if it cannot be noted, it is hashed every time
        notes.mkdir(parents=True, exist_ok=True)
        note.write_text(state)
    return None


def delete_cached(path: Path) -> None:
    """Delete a file of the cache: the link, the blob it leads to, and what that may lead to."""
    blob = path.parent / path.readlink()
    for file in (blob.resolve(), blob, path):
        file.unlink(missing_ok=True)


class _Kind(NamedTuple):
    """A kind of hash that an ETag may be: its name, and the digests of a file that are right."""

    name: str
    digests: Callable[[Path], set[str]]


def _sha256(blob: Path) -> set[str]:
    return _digests(blob, hashlib.sha256())


def _git_hash(blob: Path) -> set[str]:
    """Git's hash of a file, and its plain SHA-1, which some proxies send."""
    return _digests(blob, hashlib.sha1(b"blob %d\0" % blob.stat().st_size), hashlib.sha1())


def _digests(blob: Path, *hashes: "hashlib._Hash") -> set[str]:
    with blob.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            for it in hashes:
                it.update(chunk)
    return {it.hexdigest() for it in hashes}


HASHES = {40: _Kind("git hash", _git_hash), 64: _Kind("SHA-256", _sha256)}
"""Length of a hash in hexadecimal digits → its kind."""
