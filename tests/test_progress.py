"""A progress bar for slow steps, only on a terminal."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from helpers import GOLDEN, PLAIN, WRITTEN, entries, run_process
from speculators.convert.eagle import EagleConverter

SLOW = """
import os, time
copy = os.copy_file_range
def slowly(*arguments, **options):
    time.sleep(0.1)
    return copy(*arguments, **options)
os.copy_file_range = slowly
"""
AT_ONCE = """
import speculators.cli.progress as progress
progress.SECONDS_WITHOUT_BAR = 0.0
"""
MAIN = "from speculators.__main__ import run; run()"

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_on_a_terminal(script: str, *arguments: str | Path) -> tuple[int, str]:
    """Run a script whose stderr is a terminal; return its status, and what the terminal got."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        status = process.wait()
    os.close(ours)
    return status, shown.decode()


def test_a_long_step_shows_bytes_and_speed_and_goes(tmp_path: Path, verifier: Path) -> None:
    status, shown = run_on_a_terminal(
        SLOW + AT_ONCE + MAIN,
        *("convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, "--no-validate"),
    )
    assert status == 0
    plain = CONTROL.sub("", shown)
    assert re.search(r"Writing .*\d+(\.\d)?/\d+\.\d kB .*[kM]B/s", plain)
    # The bar is erased before the log continues.
    *_, bar, saved = [line for line in shown.replace("\r", "\n").split("\n") if line]
    assert "Saved to: " in saved
    assert "\x1b[2K" in bar or "\x1b[2K" in saved
    assert entries(tmp_path / "out") == WRITTEN


def test_a_short_step_shows_none(tmp_path: Path, verifier: Path) -> None:
    status, shown = run_on_a_terminal(
        MAIN, "convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, "--no-validate"
    )
    assert status == 0
    assert [line.split("|")[-1].strip() for line in CONTROL.sub("", shown).splitlines()] == [
        f"Converting Eagle checkpoint: {GOLDEN / PLAIN}",
        "Loaded 10 weights",
        f"Saved to: {tmp_path / 'out'}",
    ]


def test_an_error_comes_after_the_bar(tmp_path: Path, verifier: Path) -> None:
    fail = """
def broken(*_, **__):
    raise OSError(28, "No space left on device")
write = os.write
def once(descriptor, data, left=[3]):
    left[0] -= 1
    return write(descriptor, data) if left[0] > 0 else broken()
os.write = once
left = [5]
kernel = os.copy_file_range
def five_times(*arguments, **options):
    left[0] -= 1
    return kernel(*arguments, **options) if left[0] > 0 else broken()
os.copy_file_range = five_times
"""
    status, shown = run_on_a_terminal(
        SLOW + fail + AT_ONCE + MAIN,
        *("convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, "--no-validate"),
    )
    assert status == 1
    assert "Writing" in shown
    assert "No space left on device" in CONTROL.sub("", shown).splitlines()[-1]
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is shown again
    assert entries(tmp_path) == []


def test_in_a_pipe_there_is_no_bar(tmp_path: Path, verifier: Path) -> None:
    """Not even if colours are forced."""
    arguments = ("convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, "--no-validate")
    run = subprocess.run(
        [sys.executable, "-c", SLOW + AT_ONCE + MAIN, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"FORCE_COLOR": "1"},
    )
    assert run.returncode == 0
    assert "Writing" not in run.stderr
    assert len(run.stderr.splitlines()) == 3


def test_validating_tells_how_far_it_is_too(tmp_path: Path, verifier: Path) -> None:
    told: list[str] = []

    def progress(step: str, total: int) -> Callable[[int], None]:
        told.append(step)
        done = [0]

        def advance(some: int) -> None:
            done[0] += some
            assert done[0] <= total
            if done[0] == total:
                told.append(f"{step} done")

        return advance

    converter = EagleConverter()
    out = converter.convert(GOLDEN / PLAIN, tmp_path / "out", verifier, progress=progress)
    # The weights are hashed as they are compared; config.json and what was not copied, at the end.
    steps = ["Writing", "Comparing", "Hashing"]
    assert told == [word for step in steps for word in (step, f"{step} done")]
    told.clear()
    converter.validate(out, progress=progress)
    assert told == ["Hashing", "Hashing done"]


def test_help_of_both_commands(tmp_path: Path) -> None:
    assert "--dtype" in run_process("convert", "eagle", "--help", COLUMNS="120").stdout
    assert "--source" in run_process("validate", "--help", COLUMNS="120").stdout
