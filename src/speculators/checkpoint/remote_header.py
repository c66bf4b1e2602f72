"""The headers of weights on the Hub, without the weights.

Of each file of weights the few bytes are fetched that tell what is in it: the start of a
safetensors file; of a zip that ``torch.save`` wrote, its directory, the header of each entry,
and its pickle. They are put at their places in a stand-in: a file as long as the original one,
with holes where the tensors are. So the same readers, with all their checks, read it.
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

from speculators.checkpoint.hub import HubRepository
from speculators.checkpoint.repository import Repository
from speculators.checkpoint.safetensors_file import PREFIX_BYTES, find_data
from speculators.errors import CheckpointError, NoWeightsError

__all__ = ["headers_only"]

WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt)")

FIRST_BYTES = 64 << 10
"""How much is read of a file at first: few headers are longer."""

LAST_BYTES = (64 << 10, 512 << 10, 4 << 20)
"""How much is read of the end of a zip, until its directory is in it."""

ENTRY_BYTES = 512
"""How much is read of a zip's entry: its header and its name."""

READ_ENTRIES = ("data.pkl", "byteorder")
"""The entries of a zip that are no tensors' bytes, and are needed."""

MAX_PICKLE_BYTES = 64 << 20

REQUESTS_AT_ONCE = 8


@contextmanager
def headers_only(repository: Repository) -> Iterator[Repository]:
    """Give a repository of which, if it is on the Hub, no weights are downloaded.

    Its files of weights have the headers and the size of the original ones, and no data; those
    that are in the cache already are taken from there. They are gone when the context ends.

    Raises:
        NoWeightsError: later, by ``file``: a header cannot be had without the weights.

    """
    if not isinstance(repository, HubRepository):
        yield repository
        return
    with tempfile.TemporaryDirectory(prefix="speculators-") as folder:
        try:
            yield _HeadersOnly(repository, Path(folder))
        except CheckpointError as error:
            # What a reader says of a stand-in is true of the original.
            message = str(error).replace(folder, repository.name)
            raise type(error)(message) from error


class _HeadersOnly:
    """See ``headers_only``; implements ``Repository``."""

    def __init__(self, hub: HubRepository, folder: Path) -> None:
        self.name = hub.name
        self.weights = hub.weights
        self.hub = hub
        self.folder = folder

    @property
    def commit(self) -> str | None:
        """See ``Repository``."""
        return self.hub.commit

    def file(self, filename: str) -> Path | None:
        """See ``Repository``."""
        if not WEIGHTS.fullmatch(filename):
            return self.hub.file(filename)
        cached = self.hub.location(filename)
        if cached is None or cached.is_file():
            return cached
        path = self.folder / filename
        with path.open("w+b") as file:
            _StandIn(self.hub, filename, file).fill()
        return path

    def part(self, filename: str, tensors: Collection[str]) -> Path | None:  # noqa: ARG002
        """See ``Repository``."""
        return self.file(filename)

    def holds(self, filename: str) -> bool:
        """See ``Repository``."""
        return self.hub.holds(filename)


class _StandIn:
    """A file that gets the headers of one on the Hub, and its size."""

    def __init__(self, hub: HubRepository, filename: str, file: IO[bytes]) -> None:
        self.hub = hub
        self.filename = filename
        self.file = file

    def fill(self) -> None:
        """Fetch what the reader of the file will read; what is odd is left for it to tell."""
        found = self.hub.read(self.filename, 0, FIRST_BYTES)
        if found is None:
            raise self._too_dear("its server sends whole files only")
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
            raise self._too_dear("PyTorch before 1.6 wrote it, or it is not a file of weights")

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
        """Fetch a range, but for what came at first."""
        begin, end = max(start, FIRST_BYTES), start + size
        if begin < end:
            self._put(begin, self._read(begin, end - begin))

    def _read(self, start: int, size: int) -> bytes:
        data, _ = self.hub.read(self.filename, start, size) or (b"", 0)
        return data

    def _put(self, start: int, data: bytes) -> None:
        self.file.seek(start)
        self.file.write(data)

    def _too_dear(self, why: str) -> NoWeightsError:
        return NoWeightsError(
            f"{self.hub.name}/{self.filename} does not tell what is in it unless it is downloaded "
            f"whole, since {why}; to have it read, download it, and give its directory."
        )
