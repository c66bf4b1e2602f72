"""Measure converting against `cp` of the same bytes, and against speculators 0.1.0.

    python benchmarks/convert.py            an 8B draft, as in `make bench`
    python benchmarks/convert.py --size small --repeats 2 --without-earlier

A copy, a conversion and a conversion of a tiny checkpoint (the start-up time) run one after the
other, with the source in the page cache and no writes pending, so that a temporary slowdown of the
machine affects all three. Ratios are taken within each such round, and their median is reported.
The raw seconds go into benchmarks/results/convert.json.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from make_checkpoint import CONTAINERS, SIZES, write_verifier
from memory import watched_memory

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
MAKER = ROOT / "benchmarks" / "make_checkpoint.py"
RESULTS = ROOT / "benchmarks" / "results" / "convert.json"

EARLIER = "speculators==0.1.0"
EARLIER_NEEDS = ("torch==2.13.0", "typer==0.16.0", "click==8.1.8")
"""Versions that it runs with: it allows any typer, but does not start with later ones."""

COMMAND = (sys.executable, "-c", "from speculators.cli import main; main()")
TIMED_COMMAND = (
    sys.executable,
    "-c",
    """
import atexit, os, sys, time
report, real, wall, cpu = sys.argv.pop(1), os.fsync, [], []
def fsync(descriptor):
    start, start_cpu = time.perf_counter(), time.process_time()
    real(descriptor)
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - start_cpu)
os.fsync = fsync
def write():
    with open(report, "w") as file:
        file.write(f"{sum(wall)} {sum(cpu)}")
atexit.register(write)
from speculators.cli import main
main()
""",
)
"""The command line with its fsync calls timed; its first argument is the file for their sum."""


@dataclass
class Run:
    """Time and memory that a process took."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    fsync_s: float = 0.0
    """Part of the wall time; for `cp`, which does not sync, time spent after it."""
    fsync_cpu_s: float = 0.0
    """Part of the CPU time; not measured for `cp`."""
    anonymous_mb: float = 0.0
    """The most memory that it needed to itself, if that was watched."""


@dataclass
class Case:
    """All runs of one container; runs at the same index of the lists belong to one round."""

    container: str
    megabytes: float = 0.0
    cp: list[Run] = field(default_factory=list)
    convert: list[Run] = field(default_factory=list)
    startup: list[Run] = field(default_factory=list)
    earlier: list[Run] = field(default_factory=list)
    earlier_refused: str = ""

    def ratios(self, *, fsync: bool) -> list[float]:
        """Wall time of converting, minus the start-up, over that of copying."""

        def seconds(run: Run) -> float:
            return run.wall_s if fsync else run.wall_s - run.fsync_s

        return [
            (seconds(ours) - (tiny.wall_s - tiny.fsync_s)) / (copy.wall_s + fsync * copy.fsync_s)
            for ours, tiny, copy in zip(self.convert, self.startup, self.cp, strict=True)
        ]

    def cpu_ratios(self) -> list[float]:
        """The same ratios of CPU time, without fsync; other load hardly changes them."""
        return [
            (ours.cpu_s - ours.fsync_cpu_s - (tiny.cpu_s - tiny.fsync_cpu_s)) / copy.cpu_s
            for ours, tiny, copy in zip(self.convert, self.startup, self.cp, strict=True)
        ]

    def earlier_ratios(self) -> list[float]:
        """Wall time of the earlier version over ours, both with start-up and fsync."""
        return [
            theirs.wall_s / ours.wall_s
            for theirs, ours in zip(self.earlier, self.convert, strict=False)
        ]


class RunError(Exception):
    """A measured process failed; the message is the end of its output."""


def run(*command: str | Path, watched: bool = False) -> Run:
    """Run a process, and measure its time and memory.

    Args:
        *command: what to run.
        watched: whether to watch its anonymous memory.

    Raises:
        RunError: if it fails.

    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        peaks: dict[str, int] = {}
        with watched_memory(process.pid, peaks) if watched else nullcontext():
            _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RunError(output.read().decode(errors="replace")[-2000:])
    cpu, anonymous = usage.ru_utime + usage.ru_stime, peaks.get("RssAnon", 0)
    return Run(wall, cpu, usage.ru_maxrss / 1000, anonymous_mb=anonymous / 1000)


def copy(source: Path, target: Path) -> Run:
    """Run `cp -r`, then time an fsync of what it wrote."""
    done = run("cp", "-r", source, target)
    start = time.perf_counter()
    for path in [*target.iterdir(), target, target.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    done.fsync_s = time.perf_counter() - start
    return done


def convert(source: Path, target: Path, verifier: Path) -> Run:
    """Run `speculators convert eagle --no-validate`, with its fsync calls timed."""
    report = target.with_name("fsync")
    arguments = ("convert", "eagle", source, target, verifier, "--no-validate")
    done = run(*TIMED_COMMAND, report, *arguments)
    done.fsync_s, done.fsync_cpu_s = map(float, report.read_text().split())
    return done


def make_tiny(folder: Path) -> None:
    """Write a tiny checkpoint and its verifier, for ``convert_tiny``."""
    write_verifier(folder / "tiny-verifier", "small")
    run(sys.executable, MAKER, folder / "tiny", "--size", "small")


def convert_tiny(folder: Path, target: Path) -> Run:
    """Convert a checkpoint with next to nothing to copy."""
    return convert(folder / "tiny", target, folder / "tiny-verifier")


def earlier_command() -> tuple[str | Path, ...]:
    """Install the earlier version into its own environment, if it is not there yet.

    Raises:
        RunError: if it cannot be installed.

    """
    environment = CACHE / EARLIER.replace("==", "-")
    python = environment / "bin" / "python"
    command = (python, "-I", "-m", "speculators")
    try:
        run(*command, "--version")
    except (OSError, RunError):
        print(f"Installing {EARLIER} into .cache ...", flush=True)
        run(sys.executable, "-m", "venv", environment)
        run(python, "-m", "pip", "install", "--quiet", EARLIER_NEEDS[0])
        run(python, "-m", "pip", "install", "--quiet", EARLIER, *EARLIER_NEEDS)
        run(*command, "--version")
    return command


def why(error: RunError) -> str:
    """The type and first line of an error, from a traceback."""
    lines = re.findall(r"^\w+Error: .*", str(error), re.MULTILINE)
    return str(lines[-1]).strip(" :") if lines else "it failed"


def measure(
    case: Case, repeats: int, folder: Path, size: str, earlier: tuple[str | Path, ...]
) -> None:
    """Run a case: copies and conversions in turns, then the earlier version."""
    source, target, verifier = folder / case.container, folder / "out", folder / "verifier"
    run(sys.executable, MAKER, source, "--container", case.container, "--size", size)
    case.megabytes = sum(path.stat().st_size for path in source.iterdir()) / 1e6

    def once(what: Callable[[], Run]) -> Run:
        os.sync()
        try:
            return what()
        finally:
            shutil.rmtree(target, ignore_errors=True)

    once(lambda: copy(source, target))  # into the page cache
    for repeat in range(repeats):
        if repeat % 2:
            case.cp.append(once(lambda: copy(source, target)))
        case.convert.append(once(lambda: convert(source, target, verifier)))
        case.startup.append(once(lambda: convert_tiny(folder, target)))
        if not repeat % 2:
            case.cp.append(once(lambda: copy(source, target)))
        print(f"{case.container}: cp {case.cp[-1]}, convert {case.convert[-1]}", flush=True)
    if earlier:
        # It validates only if it is given a device for that.
        options = ("--algorithm", "eagle", "--verifier", verifier, "--output-path", target)
        try:
            for _ in range(min(repeats, 3)):
                case.earlier.append(once(lambda: run(*earlier, "convert", source, *options)))
                print(f"{case.container}: {EARLIER} {case.earlier[-1]}", flush=True)
        except RunError as error:
            case.earlier_refused = why(error)
    shutil.rmtree(source)


def conditions() -> dict[str, Any]:
    """The machine, the versions, and how busy the machine is."""

    def first(path: str, key: str) -> str:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "?")

    kind = subprocess.run(
        ["stat", "--file-system", "--format=%T", CACHE], capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory": first("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "file_system": kind.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("speculators", "torch", "huggingface_hub")},
        "load_average_at_start": os.getloadavg(),
    }


def summarise(cases: list[Case], helps: dict[str, list[Run]]) -> dict[str, Any]:
    """Reduce the runs to the numbers that have targets."""
    tiny = [run for case in cases for run in case.startup]
    ours = helps["ours"]
    found: dict[str, Any] = {
        "--help, CPU seconds": {"median": median(run.cpu_s for run in ours), "target": 0.25},
        "small conversion, wall seconds": {
            "median": median(run.wall_s for run in tiny),
            "of CPU": median(run.cpu_s for run in tiny),
            "target": 0.5,
        },
    }
    for case in cases:
        found[f"{case.container}, over cp"] = {
            "median": median(case.ratios(fsync=False)),
            "of CPU": median(case.cpu_ratios()),
            "target": 1.15,
        }
        found[f"{case.container}, over cp, with fsync in both"] = {
            "median": median(case.ratios(fsync=True))
        }
        found[f"{case.container}, peak MB"] = {
            "median": median(run.peak_mb for run in case.convert),
            "target": 120,
        }
        if case.earlier:
            found[f"{case.container}, {EARLIER} over ours"] = {
                "median": median(case.earlier_ratios()),
                "its peak MB": median(run.peak_mb for run in case.earlier),
            }
        elif case.earlier_refused:
            found[f"{case.container}, {EARLIER}"] = {"refused": case.earlier_refused}
    if theirs := helps.get(EARLIER):
        found[f"--help of {EARLIER}, CPU seconds"] = {"median": median(run.cpu_s for run in theirs)}
    for line in found.values():
        if "target" in line:
            line["met"] = line["median"] <= line["target"]
    return found


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-earlier", action="store_true", help=f"leave out {EARLIER}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    CACHE.mkdir(exist_ok=True)
    about = conditions()
    earlier: tuple[str | Path, ...] = ()
    not_installed = ""
    if not arguments.without_earlier:
        try:
            earlier = earlier_command()
        except RunError as error:
            not_installed = f"{EARLIER} could not be installed: {why(error)}"
    cases = [Case(container) for container in CONTAINERS]
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="bench-") as name:
        folder = Path(name)
        write_verifier(folder / "verifier", arguments.size)
        helps = {"ours": [run(*COMMAND, "--help") for _ in range(10)]}
        if earlier:
            helps[EARLIER] = [run(*earlier, "--help") for _ in range(2)]

        make_tiny(folder)
        for case in cases:
            measure(case, arguments.repeats, folder, arguments.size, earlier)
    about["load_average_at_end"] = os.getloadavg()

    summary = summarise(cases, helps)
    raw = {"cases": cases, "help": helps}
    results = {
        "conditions": about,
        "size": arguments.size,
        "summary": summary,
        "raw": json.loads(json.dumps(raw, default=asdict)),
    }
    if not_installed:
        results["earlier"] = not_installed
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    for what, numbers in summary.items():
        print(f"{what:55} {json.dumps(numbers)}")


if __name__ == "__main__":
    main()
