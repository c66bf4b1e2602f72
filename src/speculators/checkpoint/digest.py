"""SHA-256 of files."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["sha256_of_file", "sha256_of_files"]

CHUNK_BYTES = 1 << 20
# One thread hashes at about the speed of a fast disk; more than two only compete for it.
THREADS = 2


def sha256_of_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """The SHA-256 of a file, in hexadecimal digits; see ``sha256_of_files``."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def sha256_of_files(paths: Iterable[Path], advance: Callable[[int], None]) -> dict[Path, str]:
    """The SHA-256 of each file, in hexadecimal digits.

    Args:
        paths: the files; two are read at a time.
        advance: called with the number of bytes read since the last call, from any thread.

    Raises:
        OSError: if one cannot be read.

    """
    paths = list(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda path: sha256_of_file(path, advance), paths)
        return dict(zip(paths, digests, strict=True))
