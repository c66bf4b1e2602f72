"""A progress bar for slow steps, only on a terminal."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from speculators.checkpoint.progress import Progress, silent
from speculators.cli.shared import is_quiet

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["progress_bar"]

SECONDS_WITHOUT_BAR = 1.0


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a ``Progress`` that shows bars with the bytes done, their total, and the speed.

    A bar appears for a step that takes over a second, and disappears when the step is done. Nothing
    is shown with --quiet, or if standard error is not a terminal.
    """
    if is_quiet() or not sys.stderr.isatty():
        yield silent
        return
    steps: list[_Step] = []

    def begin(name: str, total: int) -> Callable[[int], None]:
        steps.append(_Step(name, total))
        return steps[-1].advance

    try:
        yield begin
    finally:
        for step in steps:
            step.end()


class _Step:
    """A step and, once it has taken ``SECONDS_WITHOUT_BAR``, its bar."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.begun = time.monotonic()
        self.lock = threading.Lock()
        self.bar: Bar | None = None

    def advance(self, done: int) -> None:
        with self.lock:
            self.done += done
            if self.done >= self.total:
                self.end()
                return
            if self.bar is None and time.monotonic() - self.begun > SECONDS_WITHOUT_BAR:
                self.bar = _show(self.name, self.total)
            if self.bar is not None:
                self.bar.update(self.bar.task_ids[0], completed=self.done)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _show(name: str, total: int) -> "Bar":
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task(name, total=total)
    bar.start()
    return bar
