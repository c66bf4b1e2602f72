"""Fetching ranges of a file's bytes from the Hub, for which its client has no function."""

import io
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from speculators.checkpoint.files.safetensors_file import encode_header
from speculators.checkpoint.hub.client import WrongRangeError
from speculators.checkpoint.hub.errors import kinds_of
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo

__all__ = ["read_range", "retried", "write_part"]

WAITS = (1, 2, 4)
"""Seconds before each retry, where the client itself does not retry."""

T = TypeVar("T")


def retried(action: Callable[[], T], *kinds: str) -> T:
    """Run ``action``, and retry it after a pause if it fails with one of ``kinds``."""
    for seconds in WAITS:
        try:
            return action()
        except Exception as error:
            if not set(kinds) & set(kinds_of(error)):
                raise
        time.sleep(seconds)
    return action()


def _range(start: int, size: int, token: str | bool | None) -> dict[str, str]:
    """Headers of a request for ``size`` bytes, without compression."""
    from huggingface_hub.utils import build_hf_headers

    wanted = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    return build_hf_headers(token=token) | wanted


def read_range(
    url: str, start: int, size: int, token: str | bool | None
) -> tuple[bytes, int] | None:
    """Read a range of bytes.

    Args:
        url: of a file.
        start: the first byte.
        size: how many; fewer are returned if the file ends before.
        token: an access token for the Hub, as for its client.

    Returns:
        The bytes, and the size of the whole file; ``None`` if the server sends whole files only, or
        the file is empty.

    Raises:
        WrongRangeError: if other bytes come than those that the server announces.
        Exception: those of the Hub's client.

    """
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

    def read() -> tuple[bytes, int] | None:
        with http_stream_backoff(
            "GET",
            url,
            headers=_range(start, size, token),
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),  # the client's own retry fails once a response has begun
        ) as response:
            if response.status_code == 416:  # an empty file has no ranges
                return None
            hf_raise_for_status(response)
            came = response.headers.get("Content-Range", "")
            total = re.fullmatch(rf"bytes {start}-\d+/(\d+)", came)
            if response.status_code != 206 or total is None:
                return None
            data = response.read()
            if len(data) != min(size, int(total[1]) - start):
                raise WrongRangeError(f"{len(data)} bytes came of {came}")
            return data, int(total[1])

    return retried(read, "TransportError")


def _fetch_run(
    url: str, run: Sequence[TensorInfo], file: BinaryIO, token: str | bool | None
) -> None:
    """Append the bytes of tensors that lie one after another to ``file``."""
    from huggingface_hub.file_download import http_get

    tail = _Tail(file)
    size = sum(info.nbytes for info in run)

    def fetch() -> None:
        tail.seek(0)
        tail.truncate()
        http_get(
            url,
            cast(BinaryIO, tail),
            headers=_range(run[0].offset, size, token),
            expected_size=size,
            displayed_filename=run[0].name,
        )

    retried(fetch, "GET 5xx")


class _Tail(io.RawIOBase):
    """What is written to a file from now on, as a file of its own.

    The client's releases before 2 take a file's position for the number of bytes that came, and
    start over at position 0.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._begin = file, file.tell()

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell() - self._begin

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        return self._file.seek(self._begin + offset) - self._begin

    def truncate(self, size: int | None = None) -> int:
        end = self.tell() if size is None else size
        return self._file.truncate(self._begin + end) - self._begin


def _runs(tensors: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """Tensors in the order of their bytes, split where other bytes are between two of them.

    A layer may have thousands, for its experts: a request for each would take far longer.
    """
    runs: list[list[TensorInfo]] = []
    end = None
    for info in sorted(tensors, key=lambda it: (it.offset, it.nbytes)):
        if info.offset == end:
            runs[-1].append(info)
        else:
            runs.append([info])
        end = info.offset + info.nbytes
    return runs


def write_part(
    part: Path, tensors: Mapping[str, TensorInfo], url: str, token: str | bool | None
) -> None:
    """Fetch tensors of the safetensors file at ``url`` into a file of their own."""
    from huggingface_hub.utils import WeakFileLock

    incomplete = part.with_suffix(".incomplete")
    part.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(part.with_suffix(".lock")):
        if part.is_file():
            return
        try:
            with incomplete.open("wb") as file:
                runs = _runs(tensors.values())
                ordered = [info for run in runs for info in run]
                planned = {info.name: PlannedTensor.copy_of(info) for info in ordered}
                file.write(encode_header(planned, {"format": "pt"}))
                for run in runs:
                    if any(info.nbytes for info in run):
                        _fetch_run(url, run, file, token)
            incomplete.replace(part)
        finally:
            incomplete.unlink(missing_ok=True)
