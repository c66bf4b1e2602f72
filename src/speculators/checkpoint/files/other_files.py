"""Files that are often found where weights should be."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from speculators.errors import CheckpointError, NotFetchedError

__all__ = ["refuse_other_files"]

HEAD_BYTES = 512

POINTER = rb"version https://git-lfs"

OTHER_FILES = {
    rb"\Z": "is empty: download it again.",
    POINTER: "is only a Git LFS pointer to the real file: fetch that with `git lfs pull`.",
    rb"\s*<(?i:!doctype|html)": "is a web page: download the file itself.",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd": (
        "is packed (by gzip, bzip2, xz, 7z or zstd): unpack it, and give what was in it."
    ),
    rb"(?s:.{257})ustar": (
        "is a tar archive (PyTorch before 0.1.10 saved such ones, too): unpack it, or load it with "
        "PyTorch and save it again."
    ),
    rb"GGUF": "is a GGUF file: give the checkpoint that it was made of.",
}
"""Pattern of a file's first bytes → what to tell the user."""


def refuse_other_files(file: IO[bytes], path: Path, more: Mapping[bytes, str]) -> None:
    """Check how a file begins, and go back to its start.

    Args:
        file: the file, just opened.
        path: its path, for messages.
        more: further patterns and sentences, as in ``OTHER_FILES``.

    Raises:
        NotFetchedError: if it is a pointer to the file.
        CheckpointError: if it matches another one of them, so it does not hold weights.

    """
    head = file.read(HEAD_BYTES)
    for pattern, sentence in {**OTHER_FILES, **more}.items():
        if re.match(pattern, head):
            error = NotFetchedError if pattern == POINTER else CheckpointError
            raise error(f"{path} {sentence}")
    file.seek(0)
