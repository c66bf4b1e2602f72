"""Running a batch: some conversions at a time, each in a process of its own.

A process, since loading a model changes settings of all of torch, and so that one that runs out
of memory takes no other one along. The processes never hear of Ctrl-C themselves: the one that
started them tells them to stop, and waits until they have cleared up.
"""

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
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from loguru import logger

from speculators.batch.manifest import Conversion
from speculators.batch.state import is_done
from speculators.convert.eagle import EagleConverter
from speculators.convert.eagle.provenance import check_files, read_record
from speculators.errors import sentence
from speculators.publish.draft import check_publishing, publish_draft

if TYPE_CHECKING:
    from loguru import Message

__all__ = ["Batch", "Outcome", "State"]

SECONDS_TO_CLEAR_UP = 30


class State(str, Enum):
    """What has become of an entry."""

    TO_DO = "to do"
    DONE_BEFORE = "done before"
    CONVERTED = "converted"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class Outcome:
    """An entry, and what has become of it.

    Attributes:
        conversion: the entry.
        state: how far it is.
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
    """What a process logs."""

    level: str
    text: str


class Done(NamedTuple):
    """The last thing that a process says."""

    error: str | None = None
    url: str | None = None


@dataclass(slots=True)
class Job:
    """A process at work.

    Attributes:
        name: of the entry, for the log.
        outcome: of the entry; stopped, until the process says otherwise.
        success: what the outcome is if nothing fails.
        process: the process.
        began: when, by the monotonic clock.

    """

    name: str
    outcome: Outcome
    success: State
    process: SpawnProcess
    began: float


class Batch:
    """Conversions to be run.

    In a script of your own, run it under ``if __name__ == "__main__":``, as everything that
    starts processes.

    Args:
        conversions: what ``read_manifest`` gives.
        jobs: how many run at a time.
        cache_dir: where downloads are kept; the Hub client's own place if not given.

    Attributes:
        outcomes: one for each conversion, in their order, true at any time.

    """

    def __init__(
        self, conversions: Sequence[Conversion], *, jobs: int = 1, cache_dir: Path | None = None
    ) -> None:
        self.outcomes = [Outcome(conversion) for conversion in conversions]
        self.jobs = jobs
        self.cache_dir = cache_dir

    def find_done(self) -> None:
        """Mark what is done already, and what cannot be done since its output is in the way."""
        for number, outcome in enumerate(self.outcomes, start=1):
            conversion = outcome.conversion
            try:
                if conversion.push_to_hub:
                    check_publishing(conversion.push_to_hub, conversion.report)
                if is_done(conversion, cache_dir=self.cache_dir):
                    outcome.state = State.DONE_BEFORE
            except Exception as error:
                outcome.state, outcome.error = State.FAILED, sentence(error)
                logger.error(f"[{self._name(number)}] {outcome.error}")

    def run(self) -> None:
        """Convert what is not done, and publish what is to be published.

        A failure does not keep the others from being done. What was published before is published
        again, which sends nothing that the Hub has already.

        Whatever ends it, Ctrl-C too, no process is left when it returns or raises, and no output
        is half made.
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
                    if not _hear(connection, running[connection]):
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


def _hear(connection: Connection, job: Job) -> bool:
    """Take what a process reports next; returns whether there was anything."""
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
    """Let processes clear up and end."""
    for job in running.values():
        job.process.terminate()
    for connection, job in running.items():
        while connection.poll(SECONDS_TO_CLEAR_UP) and _hear(connection, job):
            pass
        job.process.kill()  # if it has not heard
        job.process.join()
        job.outcome.seconds = time.monotonic() - job.began


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Start a process meanwhile: it holds back Ctrl-C and SIGTERM too, from its beginning on."""
    resource_tracker.ensure_running()  # it would let them through again when it is started
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


# In the process


def _work(
    conversion: Conversion,
    done_before: bool,
    cache_dir: Path | None,
    threads: int,
    reports: Connection,
) -> None:
    """Convert and publish, and report everything that is logged, and the end."""
    signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is imported
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # bars of several would overwrite each other

    def report(message: "Message") -> None:
        reports.send(LogLine(message.record["level"].name, message.rstrip("\n")))

    logger.remove()
    # Where nobody listens any more, sending fails: then it is time to clear up and end.
    logger.add(report, level="DEBUG", format="{message}", catch=False)
    try:
        if not done_before:
            _convert(conversion, cache_dir)
        reports.send(Done(url=_publish(conversion) if conversion.push_to_hub else None))
    except Exception as error:  # whatever it is, the others go on
        logger.debug(traceback.format_exc().rstrip())
        reports.send(Done(error=sentence(error)))


def _convert(conversion: Conversion, cache_dir: Path | None) -> None:
    EagleConverter().convert(
        conversion.input,
        conversion.output,
        conversion.base_model,
        fusion_bias=conversion.fusion_bias,
        layernorms=conversion.layernorms,
        validate=conversion.validated,
        cache_dir=cache_dir,
        revision=conversion.revision,
        overwrite=conversion.overwrite,
        dtype=conversion.dtype,
    )


def _publish(conversion: Conversion) -> str:
    assert conversion.push_to_hub
    if record := read_record(conversion.output):
        check_files(record, conversion.output)  # it may have lain there for long
    return publish_draft(
        conversion.output,
        conversion.push_to_hub,
        private=conversion.private,
        report=conversion.report,
    )


def _leave(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    sys.exit(128 + number)
