"""Run a batch: several conversions at a time, each in a process of its own.

Processes, since loading a model changes global settings of torch, and so that one that runs out of
memory does not take down the others. They do not receive Ctrl-C themselves: the parent tells them
to stop, and waits until they have cleaned up.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from loguru import logger

from speculators.batch.manifest import Conversion
from speculators.batch.state import is_done
from speculators.checkpoint.hub.access import HubAccess
from speculators.convert.conversion import convert
from speculators.convert.provenance import check_files, read_record
from speculators.errors import sentence
from speculators.families.registry import family_named
from speculators.publish.draft import check_publishing, publish_draft

if TYPE_CHECKING:
    from loguru import Message

__all__ = ["Batch", "Outcome", "State"]

SECONDS_TO_CLEAR_UP = 30

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class State(str, Enum):
    """How far an entry is, or how it ended."""

    TO_DO = "to do"
    DONE_BEFORE = "done before"
    CONVERTED = "converted"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class Outcome:
    """An entry and its outcome.

    Attributes:
        conversion: the entry.
        state: how far it is, or how it ended.
        seconds: how long it took.
        error: the sentence that says why it failed.
        url: where it was published.

    """

    conversion: Conversion
    state: State = State.TO_DO
    seconds: float = 0.0
    error: str | None = None
    url: str | None = None


class LogLine(NamedTuple):
    """A line that a process logs."""

    level: str
    text: str


class Done(NamedTuple):
    """The last message of a process: how the entry ended."""

    error: str | None = None
    url: str | None = None


@dataclass(slots=True)
class Job:
    """A process at work on an entry.

    Attributes:
        name: the name of the entry, for the log.
        outcome: the outcome of the entry, ``STOPPED`` until the process reports another.
        success: the state of the outcome if nothing fails.
        process: the process.
        began: when it started, by the monotonic clock in seconds.

    """

    name: str
    outcome: Outcome
    success: State
    process: SpawnProcess
    began: float


class Batch:
    """Conversions to run.

    It starts processes, so a script has to call ``run`` under ``if __name__ == "__main__":``.

    Args:
        conversions: what ``read_manifest`` returns.
        jobs: how many run at a time.
        cache_dir: where downloads are kept; the Hub client's default cache if not given.

    Attributes:
        outcomes: one for each conversion, in their order; up to date at any time.

    """

    def __init__(
        self, conversions: Sequence[Conversion], *, jobs: int = 1, cache_dir: Path | None = None
    ) -> None:
        self.outcomes = [Outcome(conversion) for conversion in conversions]
        self.jobs = jobs
        self.cache_dir = cache_dir

    def find_done(self) -> None:
        """Mark entries that are done already, and those that would fail for certain."""
        for number, outcome in enumerate(self.outcomes, start=1):
            conversion = outcome.conversion
            try:
                if conversion.push_to_hub:
                    check_publishing(conversion.push_to_hub, conversion.report)
                if is_done(conversion, HubAccess(self.cache_dir)):
                    outcome.state = State.DONE_BEFORE
            except Exception as error:
                outcome.state, outcome.error = State.FAILED, sentence(error)
                logger.error(f"[{self._name(number)}] {outcome.error}")

    def run(self) -> None:
        """Convert the entries that are not done, and publish those that are to be published.

        The failure of one does not stop the others. What was published before is published again,
        which sends nothing that the Hub has already.

        However it ends, even by Ctrl-C, no process is left when it returns or raises, and no output
        is half-written.
        """
        self.find_done()
        waiting = deque(
            (self._name(number), outcome)
            for number, outcome in enumerate(self.outcomes, start=1)
            if outcome.state is State.TO_DO
            or (outcome.state is State.DONE_BEFORE and outcome.conversion.push_to_hub)
        )
        logger.info(f"{len(waiting)} of {len(self.outcomes)} are to be done")
        running: dict[Connection, Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    _start(*waiting.popleft(), running, jobs=self.jobs, cache_dir=self.cache_dir)
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    if not _handle_report(connection, running[connection]):
                        _finish(running.pop(connection))
        finally:
            _stop(running)

    def _name(self, number: int) -> str:
        output = self.outcomes[number - 1].conversion.output
        return f"{number}/{len(self.outcomes)} {output.name}"


def _start(
    name: str,
    outcome: Outcome,
    running: dict[Connection, Job],
    *,
    jobs: int,
    cache_dir: Path | None,
) -> None:
    context = get_context("spawn")
    reports, process_end = context.Pipe(duplex=False)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    done_before = outcome.state is State.DONE_BEFORE
    process = context.Process(
        target=_work,
        args=(outcome.conversion, done_before, cache_dir, threads, process_end),
        daemon=True,
    )
    success = State.DONE_BEFORE if done_before else State.CONVERTED
    with _signals_held_back():
        process.start()
        process_end.close()  # so that the connection ends when the process does
        running[reports] = Job(name, outcome, success, process, time.monotonic())
        outcome.state = State.STOPPED  # unless it says otherwise before it ends


def _handle_report(connection: Connection, job: Job) -> bool:
    """Handle the next report of a process; return whether there was one."""
    try:
        report: LogLine | Done = connection.recv()
    except (EOFError, OSError):
        connection.close()
        return False
    if isinstance(report, LogLine):
        logger.log(report.level, f"[{job.name}] {report.text}")
    else:
        job.outcome.state = State.FAILED if report.error else job.success
        job.outcome.error, job.outcome.url = report
    return True


def _finish(job: Job) -> None:
    """Note how a process ended."""
    job.process.join()
    outcome = job.outcome
    outcome.seconds = time.monotonic() - job.began
    if outcome.state is State.STOPPED:
        outcome.state, outcome.error = State.FAILED, _how_it_ended(job.process.exitcode or 0)
    if outcome.error:
        logger.error(f"[{job.name}] {outcome.error}")


def _how_it_ended(exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return "Its process was killed; perhaps memory ran out: try again with fewer --jobs."
    if exitcode < 0:
        return f"Its process was ended by {signal.Signals(-exitcode).name}."
    return f"Its process ended with the status {exitcode} before it was done."


def _stop(running: dict[Connection, Job]) -> None:
    """Make processes clean up and end."""
    for job in running.values():
        job.process.terminate()
    for connection, job in running.items():
        while connection.poll(SECONDS_TO_CLEAR_UP) and _handle_report(connection, job):
            pass
        job.process.kill()  # if it did not react
        job.process.join()
        job.outcome.seconds = time.monotonic() - job.began


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM, also in a process that is started meanwhile, from its start on."""
    resource_tracker.ensure_running()  # if it were started later, that would unblock them
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


# In the child process


def _work(
    conversion: Conversion,
    done_before: bool,
    cache_dir: Path | None,
    threads: int,
    reports: Connection,
) -> None:
    """Convert and publish; report everything that is logged, and the outcome."""
    signal.signal(signal.SIGTERM, _leave)
    _end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is imported
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # those of several would overwrite each other

    def report(message: "Message") -> None:
        reports.send(LogLine(message.record["level"].name, message.rstrip("\n")))

    logger.remove()
    # If the parent is gone, sending fails: then it is time to clean up and end.
    logger.add(report, level="DEBUG", format="{message}", catch=False)
    try:
        if not done_before:
            _convert(conversion, cache_dir)
        reports.send(Done(url=_publish(conversion) if conversion.push_to_hub else None))
    except Exception as error:  # whatever it is, the others go on
        logger.debug(traceback.format_exc().rstrip())
        reports.send(Done(error=sentence(error)))


def _convert(conversion: Conversion, cache_dir: Path | None) -> None:
    convert(
        conversion.input,
        conversion.output,
        conversion.base_model,
        family=family_named(conversion.family),
        asked=conversion.asked,
        options=conversion.options,
        validate=conversion.validated,
        cache_dir=cache_dir,
        revision=conversion.revision,
        overwrite=conversion.overwrite,
        dtype=conversion.dtype,
    )


def _publish(conversion: Conversion) -> str:
    assert conversion.push_to_hub
    if record := read_record(conversion.output):
        # It may have been there for long.
        for sentence in check_files(record, conversion.output):
            logger.warning(sentence)
    return publish_draft(
        conversion.output,
        conversion.push_to_hub,
        private=conversion.private,
        report=conversion.report,
    )


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends, however it does; on Linux."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_process().pid:  # type: ignore[union-attr]
        raise SystemExit(128 + signal.SIGTERM)  # it ended before the kernel was asked


def _leave(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    sys.exit(128 + number)
