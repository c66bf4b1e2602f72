"""Conversions that are stopped at any moment, or run at once: what is left, what the next run does.

This runs as a process of its own, without torch and pytest, so it can fork hundreds of conversions
in seconds:

    python stopped_conversions.py SOURCE VERIFIER DIRECTORY

Each line of standard input is a job, as a JSON list:

    ["stop", SIGNAL, MOMENTS, SCENARIO]
    ["meet", ROUNDS, SCENARIO]

SCENARIO is a key of ``SCENARIOS``. ``stop``: the conversion sends itself SIGNAL at a moment, in
each run at a later one, and in the last run never. There is a moment before and after each call
that changes files, and several in each copy, which is made in small steps here. MOMENTS is a key of
``CHOICES``. The answer is a line of JSON: an ``Outcome`` for each run. ``meet``: two conversions to
one output start at the same time; the answer is a ``Meeting`` for each round.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speculators.cli import main

AUDITED = {
    "open",
    "ctypes.dlopen",
    "fcntl.flock",
    "os.chmod",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "shutil.rmtree",
    "tempfile.mkdtemp",
}
"""Audit events, which the interpreter raises just before a call is made (PEP 578)."""

WRAPPED = ("copy_file_range", "fsync", "pread", "write")
STEP = 65536
"""The most bytes that one call of a copy moves here."""
MARK = "moment: "


@dataclass(frozen=True)
class Scenario:
    """What is at the output at first, and whether the file system can swap two directories."""

    replaces: bool
    swaps: bool = True


SCENARIOS = {
    "fresh": Scenario(replaces=False),
    "overwrite": Scenario(replaces=True),
    "overwrite without swap": Scenario(replaces=True, swaps=False),
}


@dataclass(frozen=True)
class Outcome:
    """What a conversion that was stopped at one moment left behind.

    Attributes:
        event: what was about to happen, or had just happened; empty if it completed.
        status: how the process ended, by ``os.waitstatus_to_exitcode``.
        errors: the lines of level ERROR in its log.
        output: "before", "first" (the complete one), "missing" (if there was one) or "mixed".
        siblings: how many temporary directories are left.
        put_back: if the output was missing, what it is after a run without --overwrite.
        next_status: the status of one more run, with --overwrite if something is there.
        next_output: what the output is then.
        next_siblings: how many temporary directories are left then.

    """

    event: str
    status: int
    errors: list[str]
    output: str
    siblings: int
    put_back: str
    next_status: int
    next_output: str
    next_siblings: int


@dataclass(frozen=True)
class Meeting:
    """What two conversions to one output left behind; the second one rounds the tensors."""

    statuses: list[int]
    errors: list[list[str]]
    output: str  # "before", "first", "second", "missing" or "mixed"
    siblings: int


class Moments:
    """Tells the moments of this process, and sends it a signal at one of them, or at none (0)."""

    def __init__(self, at: int, number: int) -> None:
        self.left, self.number, self.write = at, number, os.write

    def pass_by(self, event: str) -> None:
        self.write(2, f"{MARK}{event}\n".encode())
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def watch(self) -> None:
        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in AUDITED:
                self.pass_by(f"before {event} {arguments[0]!r}")

        os.fsync = lambda _: None  # type: ignore[assignment]  # only a power failure needs it
        for name in WRAPPED:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        sys.addaudithook(audit)

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if name == "copy_file_range":
                arguments = (*arguments[:2], min(arguments[2], STEP), *arguments[3:])
            self.pass_by(f"before {name}")
            result = call(*arguments, **options)
            self.pass_by(f"after {name}")
            return result

        return wrapped


@dataclass(frozen=True)
class Fork:
    """The command line, running in a fork of this process."""

    pid: int
    stderr: int

    def end(self) -> tuple[int, list[str]]:
        """Wait for the process; return its status, and what it wrote."""
        with os.fdopen(self.stderr) as pipe:
            lines = pipe.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), lines


def fork(
    arguments: list[str],
    scenario: Scenario,
    at: int = 0,
    number: int = 0,
    begin: Callable[[], object] = lambda: None,
) -> Fork:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return Fork(pid, read_end)
    status = 99
    with contextlib.suppress(BaseException):
        os.dup2(write_end, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        if not scenario.swaps:
            ctypes.CDLL = lambda *_, **__: object()  # type: ignore[misc, assignment]
        begin()
        Moments(at, number).watch()
        status = run_here(arguments)
    os._exit(status)


def run_here(arguments: list[str]) -> int:
    sys.argv = ["speculators", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


class Conversions:
    """Runs conversions of one source, and tells what they leave behind."""

    def __init__(self, source: str, verifier: str, directory: Path) -> None:
        self.scenario, self.source, self.verifier = SCENARIOS["fresh"], source, verifier
        self.directory = directory
        self.old, first, second = (directory / name for name in ("old", "first", "second"))
        # Once in this process, so that all forks have what it imports.
        for output, options in ((self.old, ()), (first, ()), (second, ("--dtype", "bfloat16"))):
            assert run_here(self.command(output, *options)) == 0
        (self.old / "notes.txt").write_text("of the old one")
        self.states = {
            name: contents(it)
            for name, it in (("first", first), ("second", second), ("before", self.old))
        }

    def command(self, output: Path, *options: str) -> list[str]:
        place = ["convert", "eagle", self.source, str(output), self.verifier]
        return [*place, "--no-validate", *options]

    @contextlib.contextmanager
    def output(self) -> Iterator[Path]:
        place = self.directory / "place"
        place.mkdir()
        if self.scenario.replaces:
            shutil.copytree(self.old, place / "out")
        yield place / "out"
        shutil.rmtree(place)

    def state(self, output: Path) -> str:
        found = contents(output)
        if found is None:
            return "missing" if self.scenario.replaces else "before"
        before = self.scenario.replaces
        names = [
            it for it in self.states if self.states[it] == found and (before or it != "before")
        ]
        return names[0] if names else "mixed"


def contents(directory: Path) -> dict[str, bytes] | None:
    if not directory.exists():
        return None
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def siblings(output: Path) -> int:
    return len(list(output.parent.glob(".*")))


def errors(lines: list[str]) -> list[str]:
    return [line.split(" | ", 2)[2] for line in lines if "| ERROR " in line]


def events(lines: list[str]) -> list[str]:
    return [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]


def every(found: list[str]) -> list[int]:
    return [*range(1, len(found) + 1)]


def some(found: list[str]) -> list[int]:
    """Of the moments before or after calls of one function, the first and the last; all renames."""
    kinds: dict[str, list[int]] = {}
    for moment, event in enumerate(found, start=1):
        kinds.setdefault(" ".join(event.split()[:2]), []).append(moment)
    renames = kinds.pop("before os.rename", [])
    ends = {moment for of_kind in kinds.values() for moment in (of_kind[0], of_kind[-1])}
    return sorted({*ends, *renames})


CHOICES = {"every": every, "some": some}


def stop(conversions: Conversions, signal_name: str, moments: str) -> Iterator[Outcome]:
    scenario, options = conversions.scenario, ["--overwrite"] * conversions.scenario.replaces
    number = signal.Signals[signal_name]
    with conversions.output() as output:
        _, lines = fork(conversions.command(output, *options), scenario).end()
    for moment in (*CHOICES[moments](events(lines)), 0):
        with conversions.output() as output:
            command = conversions.command(output, *options)
            status, lines = fork(command, scenario, moment, number).end()
            event = events(lines)[moment - 1] if moment else ""
            found, left, put_back = conversions.state(output), siblings(output), ""
            if found == "missing":
                fork(conversions.command(output), scenario).end()
                put_back = conversions.state(output)
            command = conversions.command(output, *["--overwrite"] * output.exists())
            next_status, _ = fork(command, scenario).end()
            yield Outcome(
                event=event,
                status=status,
                errors=errors(lines),
                output=found,
                siblings=left,
                put_back=put_back,
                next_status=next_status,
                next_output=conversions.state(output),
                next_siblings=siblings(output),
            )


def meet(conversions: Conversions, rounds: str) -> Iterator[Meeting]:
    options = ["--overwrite"] * conversions.scenario.replaces
    for _ in range(int(rounds)):
        with conversions.output() as output:
            gate, hold = os.pipe()

            def begin(gate: int = gate, hold: int = hold) -> None:
                os.close(hold)
                os.read(gate, 1)  # until it is closed everywhere else

            both = [
                fork(
                    conversions.command(output, *options, *more), conversions.scenario, begin=begin
                )
                for more in ((), ("--dtype", "bfloat16"))
            ]
            os.close(gate)
            os.close(hold)
            ends = [one.end() for one in both]
            yield Meeting(
                statuses=[status for status, _ in ends],
                errors=[errors(lines) for _, lines in ends],
                output=conversions.state(output),
                siblings=siblings(output),
            )


def perform(conversions: Conversions, what: str, *how: str) -> Iterator[Outcome | Meeting]:
    *options, which = how
    conversions.scenario = SCENARIOS[which]
    yield from (stop if what == "stop" else meet)(conversions, *options)


if __name__ == "__main__":
    source, verifier, directory = sys.argv[1:]
    conversions = Conversions(source, verifier, Path(directory))
    for line in sys.stdin:
        results = [asdict(it) for it in perform(conversions, *json.loads(line))]
        print(json.dumps(results), flush=True)
