"""The headers of weight files on the Hub, without the weights.

Only the few bytes of a weight file that say what is in it are fetched: the start of a safetensors
file; the directory, the header of each entry and the pickle of a zip that ``torch.save`` wrote.
They are put at their offsets in a stand-in, a sparse file that is as long as the original, with
holes where the tensors are. So the usual readers can read it, with all their checks.
"""

import re
import struct
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from speculators.checkpoint.files.safetensors_file import (
    PREFIX_BYTES,
    find_data,
    read_safetensors_file,
)
from speculators.checkpoint.files.torch_file import read_torch_file
from speculators.checkpoint.hub.repository import HubRepository
from speculators.checkpoint.repository import Repository
from speculators.errors import CheckpointError, NoWeightsError

__all__ = ["headers_only"]

WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt)")

FIRST_BYTES = 64 << 10
"""Bytes of a file that are read first; few headers are longer."""

LAST_BYTES = (64 << 10, 512 << 10, 4 << 20)
"""Bytes that are read of the end of a zip, one after another until they hold its directory."""

ENTRY_BYTES = 512
"""Bytes that are read of an entry of a zip, for its header and its name."""

READ_ENTRIES = ("data.pkl", "byteorder")
"""The entries of a zip whose content is needed; the others hold the tensors' bytes."""

MAX_PICKLE_BYTES = 64 << 20

REQUESTS_AT_ONCE = 8


@contextmanager
def headers_only(repository: Repository) -> Iterator[Repository]:
    """Yield the same repository but, if it is on the Hub, without downloading its weights.

    Its weight files have the headers and the sizes of the originals, but no data; files that are
    cached already are used as they are. The stand-ins are deleted when the context ends.

    Raises:
        NoWeightsError: later, by ``file``, if a header cannot be read without the weights.

    """
    if not isinstance(repository, HubRepository):
        yield repository
        return
    with tempfile.TemporaryDirectory(prefix="speculators-") as folder:
        try:
            yield _HeadersOnly(repository, Path(folder))
        except CheckpointError as error:
            # What a reader says about a stand-in is true of the original, so name that.
            message = str(error).replace(folder, repository.name)
            raise type(error)(message) from error


class _HeadersOnly:
    """See ``headers_only``; implements ``Repository``."""

    def __init__(self, original: HubRepository, folder: Path) -> None:
        self.name = original.name
        self.weights = original.weights
        self.hub = original.hub
        self.original = original
        self.folder = folder

    @property
    def commit(self) -> str | None:
        """See ``Repository``."""
        return self.original.commit

    def file(self, filename: str) -> Path | None:
        """See ``Repository``."""
        if not WEIGHTS.fullmatch(filename):
            return self.original.file(filename)
        cached = self.original.location(filename)
        if cached is None:
            return None
        if cached.is_file():
            return cached if _is_readable(cached) else self.original.file(filename)
        path = self.folder / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as file:
            _StandIn(self.original, filename, file).fill()
        return path

    def part(self, filename: str, tensors: Collection[str]) -> Path | None:  # noqa: ARG002
        """See ``Repository``."""
        return self.file(filename)

    def holds(self, filename: str) -> bool:
        """See ``Repository``."""
        return self.original.holds(filename)

    def names(self) -> list[str]:
        """See ``Repository``."""
        return self.original.names()

    def unseen(self) -> str | None:
        """See ``Repository``."""
        return self.original.unseen()


def _is_readable(file: Path) -> bool:
    """Whether the header of a cached file can be read, so that it need not be fetched again."""
    read = read_safetensors_file if file.suffix == ".safetensors" else read_torch_file
    try:
        read(file)
    except CheckpointError:
        return False
    return True


class _StandIn:
    """A local file that gets the headers and the size of one on the Hub."""

    def __init__(self, hub: HubRepository, filename: str, file: IO[bytes]) -> None:
        self.hub = hub
        self.filename = filename
        self.file = file

    def fill(self) -> None:
        """Fetch what the reader of the file will read; damage is left for it to report."""
        found = self.hub.read(self.filename, 0, FIRST_BYTES)
        if found is None:
            raise self._needs_whole_file("its server sends whole files only")
        first, size = found
        self.file.truncate(size)
        self._put(0, first)
        if size <= len(first):
            return
        if self.filename.endswith(".safetensors"):
            with suppress(CheckpointError):
                data = find_data(first[:PREFIX_BYTES], size, Path(self.filename))
                self._fetch(0, data)
        elif first.startswith(b"PK"):
            self._fill_zip(size)
        else:
            raise self._needs_whole_file(
                "PyTorch before 1.6 wrote it, or it is not a file of weights"
            )

    def _fill_zip(self, size: int) -> None:
        infos: list[zipfile.ZipInfo] = []
        for last in LAST_BYTES:
            self._fetch(size - last, last)
            with suppress(Exception), zipfile.ZipFile(self.file) as archive:
                infos = archive.infolist()
                break
        far = [it.header_offset for it in infos if it.header_offset + ENTRY_BYTES > FIRST_BYTES]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            heads = list(pool.map(lambda offset: self._read(offset, ENTRY_BYTES), far))
        for offset, head in zip(far, heads, strict=True):
            self._put(offset, head)
        for info in infos:
            if info.filename.rpartition("/")[2] in READ_ENTRIES:
                self.file.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(struct.unpack("<HH", self.file.read(4)))
                self._fetch(start, min(info.file_size, MAX_PICKLE_BYTES))

    def _fetch(self, start: int, size: int) -> None:
        """Fetch a range, except for what is in the first bytes, which are there already."""
        begin, end = max(start, FIRST_BYTES), start + size
        if begin < end:
            self._put(begin, self._read(begin, end - begin))

    def _read(self, start: int, size: int) -> bytes:
        data, _ = self.hub.read(self.filename, start, size) or (b"", 0)
        return data

    def _put(self, start: int, data: bytes) -> None:
        self.file.seek(start)
        self.file.write(data)

    def _needs_whole_file(self, why: str) -> NoWeightsError:
        return NoWeightsError(
            f"{self.hub.name}/{self.filename} cannot be inspected without "
            f"downloading all of it, since {why}; download it, and give its directory."
        )
