"""SHA-256 of files."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["sha256_of_files"]

CHUNK_BYTES = 1 << 20
# One reads and hashes at about the speed of a fast disk; more only compete for it.
THREADS = 2


def sha256_of_files(paths: Iterable[Path], advance: Callable[[int], None]) -> dict[Path, str]:
    """The SHA-256 of each file, in hexadecimal digits.

    Args:
        paths: the files; two are read at a time.
        advance: called with the number of bytes read since the last call, from any thread.

    Raises:
        OSError: if one cannot be read.

    """

    def sha256_of(path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
        return digest.hexdigest()

    paths = list(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(paths, pool.map(sha256_of, paths), strict=True))
