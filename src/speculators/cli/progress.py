"""A bar for what takes long, on a terminal alone."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from speculators.checkpoint.progress import Progress as ProgressCallback
from speculators.checkpoint.progress import silent
from speculators.cli.shared import is_quiet

__all__ = ["progress_bar"]

SECONDS_WITHOUT_BAR = 1.0


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Give what shows a step's bytes, of how many, and how many a second, beside the log.

    A bar appears for a step that takes over a second, and goes when the step is done. Where the
    log is no terminal, and with --quiet, nothing is shown.
    """
    if is_quiet() or not sys.stderr.isatty():
        yield silent
        return
    bars = _Bars()
    try:
        yield bars.begin
    finally:
        bars.end()


class _Bars:
    """One bar after the other."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Progress | None = None

    def begin(self, step: str, total: int) -> Callable[[int], None]:
        self.end()
        bar = self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        task = bar.add_task(step, total=total)
        shown_from = time.monotonic() + SECONDS_WITHOUT_BAR

        def advance(done: int) -> None:
            bar.advance(task, done)
            if bar.finished:
                bar.stop()
            elif time.monotonic() > shown_from:
                bar.start()

        return advance

    def end(self) -> None:
        if self.bar:
            self.bar.stop()
