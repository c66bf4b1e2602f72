"""SHA-256 of files."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speculators.checkpoint.identity import FileIdentity, open_unchanged

__all__ = ["sha256_of_file", "sha256_of_files"]

CHUNK_BYTES = 1 << 20
# One thread hashes at about the speed of a fast disk; more than two only compete for it.
THREADS = 2

Identities = Mapping[Path, FileIdentity | None]


def sha256_of_file(
    path: Path,
    advance: Callable[[int], None] = lambda _: None,
    identity: FileIdentity | None = None,
) -> str:
    """The SHA-256 of a file, in hexadecimal digits; see ``sha256_of_files``."""
    digest = hashlib.sha256()
    with open_unchanged(path, identity) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def sha256_of_files(
    paths: Iterable[Path], advance: Callable[[int], None], identities: Identities | None = None
) -> dict[Path, str]:
    """The SHA-256 of each file, in hexadecimal digits.

    Args:
        paths: the files; two are read at a time.
        advance: called with the number of bytes read since the last call, from any thread.
        identities: what files were when they were first read, by their paths.

    Raises:
        CheckpointError: if one cannot be opened, was replaced or written to since, or changes
            while it is read.
        OSError: if one cannot be read.

    """
    paths, known = list(paths), identities or {}
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda path: sha256_of_file(path, advance, known.get(path)), paths)
        return dict(zip(paths, digests, strict=True))
