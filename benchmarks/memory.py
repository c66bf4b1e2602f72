"""The memory that a process needs to itself."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["watched_memory"]

POLL_S = 0.005


@contextmanager
def watched_memory(pid: int, peaks: dict[str, int]) -> Iterator[None]:
    """Poll the anonymous memory of a process, in kB; the largest is ``peaks["RssAnon"]`` at last.

    The resident set also counts the files that are mapped, which the system can drop at any time.
    """
    done = threading.Event()
    peaks["RssAnon"] = 0

    def poll() -> None:
        while not done.wait(POLL_S):
            try:
                status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
            except OSError:
                return
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
