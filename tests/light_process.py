"""Runs code in forks of a process that has imported all modules that need no torch.

This runs as a process of its own, since that of the tests has torch. Each line of standard input is
a job as JSON, and is answered by an ``Outcome``:

    {"code": "import numpy", "arguments": [], "cwd": null}

Its argument is JSON, too: the names of what counts as heavy, and of the light modules. Before the
first job it says what these load, imported in order, and in reverse order.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["LightProcess", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How code ended, what it loaded of what is heavy, and what it wrote to standard error."""

    status: int
    loaded: list[str]
    stderr: str


class LightProcess:
    """The process, seen from the tests.

    Attributes:
        imports: what it took to import the modules, in order and in reverse order.

    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.imports = [self._answer(), self._answer()]

    def run(self, code: str, *arguments: str, cwd: Path | None = None) -> Outcome:
        job = {"code": code, "arguments": arguments, "cwd": None if cwd is None else str(cwd)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Outcome:
        assert self._process.stdout is not None
        return Outcome(**json.loads(self._process.stdout.readline()))

    @classmethod
    @contextlib.contextmanager
    def start(cls, heavy: Sequence[str], light: Sequence[str]) -> Iterator["LightProcess"]:
        command = [sys.executable, __file__, json.dumps([heavy, light])]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            yield cls(process)
            assert process.stdin is not None
            process.stdin.close()


def import_all(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


def forked(action: Callable[[], object], heavy: Sequence[str]) -> Outcome:
    """What becomes of an action in a fork of this process."""
    with tempfile.TemporaryFile("w+") as stderr, tempfile.TemporaryFile("w+") as found:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(stderr.fileno(), 2)
                try:
                    action()
                    status = 0
                except SystemExit as stop:
                    status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
                except BaseException:
                    traceback.print_exc()
                sys.stderr.flush()
                json.dump([it for it in heavy if it in sys.modules], found)
                found.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        stderr.seek(0)
        found.seek(0)
        return Outcome(status, json.load(found), stderr.read())


def perform(job: dict[str, Any]) -> None:
    if job["cwd"] is not None:
        os.chdir(job["cwd"])
    sys.argv = ["speculators", *job["arguments"]]
    exec(job["code"], {"__name__": "__main__"})


def serve(heavy: Sequence[str], light: Sequence[str]) -> Iterator[Outcome]:
    reverse = forked(lambda: import_all(light[::-1]), heavy)
    import_all(light)
    yield Outcome(0, [it for it in heavy if it in sys.modules], "")
    yield reverse
    for line in sys.stdin:
        job = json.loads(line)
        yield forked(lambda job=job: perform(job), heavy)  # type: ignore[misc]


if __name__ == "__main__":
    for outcome in serve(*json.loads(sys.argv[1])):
        print(json.dumps(asdict(outcome)), flush=True)
