"""Runs of a conversion beside those of `cp`, and of the PyPI project speculators 0.9.0.

`cp` copies what the conversion wrote. Both follow each other, in either order in turns. Either may
take twice as long as the run before, as the kernel finds free pages of memory: of three runs of
each, the ones that took the least CPU time make a pair. Ratios are taken within pairs, and their
median is reported.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from convert import ROOT, TIMED_COMMAND, Case, Run, copy, run

__all__ = [
    "UPSTREAM",
    "UPSTREAM_VERSION",
    "Compared",
    "compare",
    "measure",
    "speculators",
    "summarise",
    "upstream",
]

UPSTREAM = ROOT / ".venv-upstream" / "bin" / "python"
UPSTREAM_VERSION = "speculators==0.9.0"

TARGETS = {"over cp": 1.15, "peak MB": 60, "CPU": 20, "memory": 60}
"""At most the first two; at least the others, of what speculators 0.9.0 takes over ours."""


TURNS = 3
"""How many runs of each there are to a pair."""


@dataclass
class Compared:
    """Runs on the same input; those at the same index followed each other."""

    ours: list[Run] = field(default_factory=list)
    upstream: list[Run] = field(default_factory=list)


def speculators(report: Path, *arguments: str | Path, watched: bool = False) -> Run:
    """Run our command line with its fsync calls timed; ``report`` is a file that it may use."""
    done = run(*TIMED_COMMAND, report, *arguments, watched=watched)
    done.fsync_s, done.fsync_cpu_s = map(float, report.read_text().split())
    return done


def upstream(algorithm: str, source: Path, target: Path, verifier: Path) -> Run:
    """Let speculators 0.9.0 convert; it validates only if it is given a device."""
    options = ("--algorithm", algorithm, "--verifier", verifier, "--output-path", target)
    return run(UPSTREAM, "-I", "-m", "speculators", "convert", source, *options, watched=True)


def measure(
    case: Case, repeats: int, folder: Path, ours: Callable[[Path], Run], tiny: Callable[[Path], Run]
) -> None:
    """Run a command, `cp` of what it writes, and the command on a tiny input, in turns.

    Args:
        case: gets the runs.
        repeats: how many pairs.
        folder: where to write.
        ours: runs the command, given the directory to write.
        tiny: likewise, with next to nothing to copy: the start-up.

    """
    written, target = folder / "written", folder / "out"
    ours(written)
    case.megabytes = sum(path.stat().st_size for path in written.iterdir()) / 1e6
    _once(target, lambda: copy(written, target))  # the memory was used before, and is in use
    for _ in range(repeats):
        turns: tuple[tuple[list[Run], Callable[[], Run]], ...] = (
            ([], lambda: ours(target)),
            ([], lambda: copy(written, target)),
        )
        for number in range(TURNS):
            for runs, what in turns if number % 2 else reversed(turns):
                runs.append(_once(target, what))
        for kept, (runs, _) in zip((case.convert, case.cp), turns, strict=True):
            kept.append(min(runs, key=lambda it: it.cpu_s - it.fsync_cpu_s))
        case.startup.append(_once(target, lambda: tiny(target)))
        print(f"{case.container}: cp {case.cp[-1]}, ours {case.convert[-1]}", flush=True)
    shutil.rmtree(written)


def compare(
    compared: Compared,
    repeats: int,
    folder: Path,
    ours: Callable[[Path], Run],
    theirs: Callable[[Path], Run],
) -> None:
    """Run ours and speculators 0.9.0, one after the other."""
    target = folder / "out"
    for _ in range(repeats):
        compared.ours.append(_once(target, lambda: ours(target)))
        compared.upstream.append(_once(target, lambda: theirs(target)))
        print(f"ours {compared.ours[-1]}, {UPSTREAM_VERSION} {compared.upstream[-1]}", flush=True)


def summarise(case: Case, compared: Compared | None = None) -> dict[str, Any]:
    """Reduce the runs to the numbers that have targets."""
    over = case.ratios(fsync=False)
    found: dict[str, Any] = {
        "MB written": round(case.megabytes),
        "over cp": {
            "median": median(over),
            "least": min(over),
            "most": max(over),
            "of CPU": median(case.cpu_ratios()),
            "at most": TARGETS["over cp"],
        },
        "CPU seconds": median(it.cpu_s for it in case.convert),
        "start-up, CPU seconds": median(it.cpu_s for it in case.startup),
        "peak MB": {
            "most": max(it.peak_mb for it in case.convert),
            "at most": TARGETS["peak MB"],
        },
    }
    if compared is not None and compared.upstream:
        for what, key, target in (
            ("CPU seconds", "cpu_s", TARGETS["CPU"]),
            ("peak MB", "peak_mb", TARGETS["memory"]),
            ("peak anonymous MB", "anonymous_mb", TARGETS["memory"]),
        ):
            pairs = [
                (getattr(one, key), getattr(other, key))
                for one, other in zip(compared.ours, compared.upstream, strict=True)
            ]
            found[f"{what}, {UPSTREAM_VERSION} beside ours"] = {
                "ours": median(one for one, _ in pairs),
                "theirs": median(other for _, other in pairs),
                "ratio": median(other / one for one, other in pairs),
                "at least": target,
            }
    return found


def _once(target: Path, what: Callable[[], Run]) -> Run:
    """Run with no writes pending, and remove what it wrote."""
    os.sync()
    try:
        return what()
    finally:
        shutil.rmtree(target, ignore_errors=True)
