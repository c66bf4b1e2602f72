"""Processes that are told what to do, and tell what they measured, in lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Process", "kernel_times", "tell_by_stdout"]

BENCHMARKS = Path(__file__).resolve().parents[1]


class Process:
    """A script that answers each line of its standard input with one, seen from outside.

    Args:
        script: uses ``tell_by_stdout``.
        job: the first line, to which it answers once it is ready.
        environment: of the process; the benchmarks can be imported in it, too.
        log: where it logs to.

    """

    def __init__(self, script: str, job: Any, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        paths = [str(BENCHMARKS), *filter(None, [environment.get("PYTHONPATH")])]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._send(job)

    def told(self) -> dict[str, Any]:
        """Wait for its next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"A process stopped; its log, {self.log}, says why.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, task: Any) -> dict[str, Any]:
        """Have it do a task, and wait for its answer."""
        self._send(task)
        return self.told()

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()

    def _send(self, what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()


def tell_by_stdout() -> Callable[[dict[str, Any]], None]:
    """A function that writes an answer; what else is written to standard output goes to the log.

    vLLM logs there, and so may what it starts.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(measured: dict[str, Any]) -> None:
        output.write(json.dumps(measured) + "\n")
        output.flush()

    return tell


def kernel_times(record: Any) -> dict[str, list[float]]:
    """Kernel by name → its milliseconds and launches in a record of torch's profiler."""
    kernels: dict[str, list[float]] = {}
    for event in record.events():
        if event.device_time_total:
            one = kernels.setdefault(event.name, [0.0, 0])
            one[0] += event.device_time_total / 1000
            one[1] += 1
    return kernels
