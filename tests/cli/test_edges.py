"""Closed streams, signals, and text from files that tries to drive the terminal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import GOLDEN, PLAIN, CommandLine, entries, stored_tensors, write_checkpoint

MAIN = "from speculators.cli import main; main()"


def shell(command: str, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which $SPECULATORS is the command line."""
    environment = {
        "SPECULATORS": f"{sys.executable} -c '{MAIN}'",
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.run(
        ["sh", "-c", command.replace("$SPECULATORS", environment["SPECULATORS"])],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_conversion_with_closed_streams(tmp_path: Path, verifier: Path, closed: str) -> None:
    """What is logged must not end up in the file that takes the stream's number."""
    done = shell(
        f'$SPECULATORS convert eagle "$SOURCE" "$OUT" "$VERIFIER" --no-validate --debug {closed}',
        SOURCE=GOLDEN / PLAIN,
        OUT=tmp_path / "out",
        VERIFIER=verifier,
    )
    assert done.returncode == 0, done.stderr
    assert len(stored_tensors(tmp_path / "out")) == 10


def test_printing_to_a_closed_stream(tmp_path: Path) -> None:
    done = shell('$SPECULATORS inspect "$SOURCE" >&-', SOURCE=GOLDEN / PLAIN)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", ["--version", "--help", "convert --help"])
def test_output_that_cannot_be_written(arguments: str) -> None:
    done = shell(f"$SPECULATORS {arguments} >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "The output cannot be printed: No space left on device.\n"


INTERRUPTED = """
import builtins, os, signal
original = builtins.__import__
def import_slowly(name, *rest):
    if name == "typer":
        os.kill(os.getpid(), signal.SIGINT)
    return original(name, *rest)
builtins.__import__ = import_slowly
from speculators.cli import main
main()
"""


def test_an_interrupt_while_modules_are_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "--help"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


HUNG_UP = """
import os, signal, sys
from speculators.checkpoint.output import staging
def hang_up(*_):
    os.kill(os.getpid(), signal.SIGHUP)
staging.sync = hang_up
sys.argv[0] = "speculators"
from speculators.cli import main
main()
"""


@pytest.mark.parametrize(("nohup", "status"), [(False, 129), (True, 0)])
def test_a_terminal_that_is_closed(
    tmp_path: Path, verifier: Path, nohup: bool, status: int
) -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" if nohup else ""
    arguments = [GOLDEN / PLAIN, tmp_path / "out", verifier, "--no-validate"]
    done = subprocess.run(
        [sys.executable, "-c", code + HUNG_UP, "convert", "eagle", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert bool(entries(tmp_path)) == nohup
    assert ("The terminal was closed." in done.stderr) != nohup


def test_text_from_a_file_does_not_drive_the_terminal(
    tmp_path: Path, verifier: Path, speculators: CommandLine
) -> None:
    value = "\x1b[2Jx\n2026-01-01 00:00:00 | SUCCESS  | Valid\x9b31m"
    source = write_checkpoint(tmp_path / "source", config={"hidden_act": value, "my\x1bkey": 1})
    for command in (
        ["inspect", source],
        ["convert", "eagle", source, tmp_path / "out", verifier, "--dry-run"],
    ):
        run = speculators(*command)
        shown = run.stdout + run.stderr
        assert "\x1b" not in shown
        assert "\x9b" not in shown
        assert "\n2026-01-01" not in shown
        assert "x1b[2J" in shown


def is_running(pid: str) -> bool:
    """Whether a process exists that is not just waiting to be noticed by its parent."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status


def test_a_batch_whose_parent_is_killed(tmp_path: Path, verifier: Path) -> None:
    """No process goes on working on an entry, and nothing is left half-written."""
    manifest = [
        {"input": str(GOLDEN / PLAIN), "output": str(tmp_path / "out"), "base_model": str(verifier)}
    ]
    (tmp_path / "batch.json").write_text(json.dumps(manifest))
    batch = subprocess.Popen(
        [sys.executable, "-c", MAIN, "convert", "eagle", "--manifest", tmp_path / "batch.json"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert batch.stderr is not None
    for line in batch.stderr:
        if "Loaded" in line:
            break
    children = Path(f"/proc/{batch.pid}/task/{batch.pid}/children").read_text().split()
    batch.send_signal(signal.SIGKILL)
    batch.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [it for it in entries(tmp_path) if it.startswith(".")] == []


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [("SIGTERM", 143, "Terminated."), ("SIGHUP", 129, "The terminal was closed.")],
)
def test_a_signal_before_there_is_a_log(number: str, status: int, said: str) -> None:
    """The sentence alone is printed, not in the log's default format."""
    early = f"""
import os, signal
import speculators.cli.app as starting
starting.app = lambda: os.kill(os.getpid(), signal.{number})
{MAIN}
"""
    done = subprocess.run(
        [sys.executable, "-c", early], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said + "\n")
