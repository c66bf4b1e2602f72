"""Measure what the proof of a conversion costs, against an earlier commit.

    python benchmarks/prove.py              8B drafts, against 5b99fb5
    python benchmarks/prove.py --size small --repeats 1

An EAGLE and an EAGLE-3 draft are converted with validation, and the results validated, alone and
with their source. Each command runs with the earlier commit's code and with this one's, one after
the other, in turns; ratios are taken between such pairs, and the median is reported. Anonymous
memory is what a process needs to itself; the resident set also counts the files that are mapped,
which the system can drop at any time. The raw numbers go into benchmarks/results/prove.json.
"""

import argparse
import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from make_checkpoint import SIZES
from memory import watched_memory

from convert import CACHE, MAKER, ROOT, RunError, conditions

RESULTS = ROOT / "benchmarks" / "results" / "prove.json"
BEFORE = "5b99fb5"
"""The last commit before the proof was made cheaper."""

TARGETS = {"cpu": 1 / 4, "anonymous": 1 / 6}
"""The largest ratios allowed, of CPU time and of peak anonymous memory."""


@dataclass
class Proof:
    """Time and memory that a command took."""

    wall_s: float
    cpu_s: float
    anonymous_mb: float
    resident_mb: float
    load: float
    """The load average when it began."""


def measured(code: Path, *arguments: str | Path) -> Proof:
    """Run a command of the command line with the code in a folder.

    Raises:
        RunError: if it fails.

    """
    environment = os.environ | {
        "PYTHONPATH": str(code),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    os.sync()
    load, start = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "speculators", *map(str, arguments)],
            stdout=output,
            stderr=output,
            env=environment,
        )
        peaks: dict[str, int] = {}
        with watched_memory(process.pid, peaks):
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RunError(output.read().decode(errors="replace")[-2000:])
    return Proof(
        wall_s=time.perf_counter() - start,
        cpu_s=usage.ru_utime + usage.ru_stime,
        anonymous_mb=peaks["RssAnon"] / 1000,
        resident_mb=usage.ru_maxrss / 1000,
        load=load,
    )


@contextmanager
def code_of(commit: str | None) -> Iterator[Path]:
    """The ``src`` of a commit, or of this checkout, in a temporary folder.

    It is compiled there, as pip does when it installs.
    """
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="code-") as name:
        code = Path(name) / "src"
        if commit is None:
            shutil.copytree(ROOT / "src", code)
        else:
            archive = subprocess.run(
                ["git", "-C", ROOT, "archive", commit, "src"], check=True, capture_output=True
            )
            subprocess.run(["tar", "-x", "-C", name], check=True, input=archive.stdout)
        compileall.compile_dir(code, quiet=1)
        yield code


def cases(folder: Path) -> dict[str, tuple[str | Path, ...]]:
    """The commands, each of which can use what those before it made."""
    verifier = folder / "verifier"
    found: dict[str, tuple[str | Path, ...]] = {}
    for kind, options in (("eagle", ()), ("eagle3", ("--aux-layers", "2,16,29"))):
        source, out = folder / kind, folder / f"{kind}-out"
        convert = ("convert", kind, source, out, verifier, "--overwrite", *options)
        found[f"convert {kind}"] = convert
        found[f"validate, {kind}"] = ("validate", out)
        found[f"validate --source, {kind}"] = ("validate", out, "--source", source)
    return found


def compare(
    folder: Path, before: Path, now: Path, repeats: int
) -> dict[str, dict[str, list[Proof]]]:
    """Run every case, in turns with either code."""
    runs: dict[str, dict[str, list[Proof]]] = {}
    for case, command in cases(folder).items():
        runs[case] = {"before": [], "now": []}
        for _ in range(repeats):
            for which, code in (("before", before), ("now", now)):
                runs[case][which].append(measured(code, *command))
                print(f"{case}, {which}: {runs[case][which][-1]}", flush=True)
    return runs


def summarise(runs: dict[str, dict[str, list[Proof]]]) -> dict[str, Any]:
    """Reduce the runs to medians and ratios."""
    found: dict[str, Any] = {}
    for case, of in runs.items():
        line: dict[str, Any] = {
            which: {
                key: round(median(getattr(run, key) for run in proofs), 2)
                for key in ("wall_s", "cpu_s", "anonymous_mb", "resident_mb")
            }
            for which, proofs in of.items()
        }
        pairs = list(zip(of["now"], of["before"], strict=True))
        line["cpu"] = round(median(now.cpu_s / before.cpu_s for now, before in pairs), 3)
        line["anonymous"] = round(
            median(now.anonymous_mb / before.anonymous_mb for now, before in pairs), 3
        )
        line["met"] = all(line[what] <= target for what, target in TARGETS.items())
        found[case] = line
    return found


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="8B")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    CACHE.mkdir(exist_ok=True)
    about = conditions()
    with (
        tempfile.TemporaryDirectory(dir=CACHE, prefix="prove-") as name,
        code_of(arguments.before) as before,
        code_of(None) as now,
    ):
        folder = Path(name)
        for kind in ("verifier", "eagle", "eagle3"):
            subprocess.run(
                [sys.executable, MAKER, folder / kind, "--size", arguments.size, "--kind", kind],
                check=True,
            )
        runs = compare(folder, before, now, arguments.repeats)
        shutil.rmtree(folder, ignore_errors=True)
    about["load_average_at_end"] = os.getloadavg()
    summary = summarise(runs)
    results = {
        "conditions": about,
        "size": arguments.size,
        "before": arguments.before,
        "targets": TARGETS,
        "summary": summary,
        "raw": json.loads(json.dumps(runs, default=asdict)),
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    for what, numbers in summary.items():
        print(f"{what:28} {json.dumps(numbers)}")


if __name__ == "__main__":
    main()
