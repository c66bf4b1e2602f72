"""What all commands have in common: help, shared options, log, exit status."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import COMMANDS
from helpers import GOLDEN, PLAIN, CommandLine, run_process, write_checkpoint

SOURCE = GOLDEN / PLAIN

COLOUR = re.compile(r"\x1b\[(\d+;)*(3[0-8]|9[0-7])(;\d+)*m")
"""An escape sequence that chooses a colour."""

MAIN = "import sys; sys.argv[0] = 'speculators'; from speculators.__main__ import run; run()"


def on_a_terminal(*arguments: str | Path, **environment: str) -> str:
    """What a process prints if stdout and stderr are a terminal."""
    master, slave = pty.openpty()
    unset = dict.fromkeys(("NO_COLOR", "FORCE_COLOR"), "")
    env = {k: v for k, v in os.environ.items() if k not in unset} | {"TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env | environment,
    ) as process:
        os.close(slave)
        shown = b""
        try:
            while chunk := os.read(master, 4096):
                shown += chunk
        except OSError:  # this is how Linux says that the other end is closed
            pass
        process.wait()
    os.close(master)
    return shown.decode()


def test_there_are_commands() -> None:
    assert {("convert", "eagle"), ("inspect",), ("validate",), ("doctor",)} <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(speculators: CommandLine, command: tuple[str, ...]) -> None:
    run = speculators(*command, "--help")
    assert (run.status, run.stderr) == (0, "")
    assert "\x1b" not in run.stdout
    for option in ("--quiet", "-q", "--debug", "--help", "-h"):
        assert re.search(rf"[\s│]{option}\s", run.stdout), option
    assert f"\n speculators {' '.join(command)}" in run.stdout, "an example"
    assert run.stdout == speculators(*command, "-h").stdout


def test_the_help_of_all_lists_the_commands_and_the_statuses(speculators: CommandLine) -> None:
    run = speculators("--help")
    assert run.status == 0
    for name, *_ in COMMANDS:
        assert re.search(rf"│ {name} ", run.stdout)
    assert "Exit status: 0 done, 1 an error" in run.stdout
    assert speculators().stdout.strip() == run.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "status", "printed"),
    [
        (["--version"], 0, "speculators "),
        (["inspect", "no/such/directory"], 1, ""),
        (["transmogrify"], 2, ""),
    ],
    ids=["done", "an error", "wrong usage"],
)
def test_python_m(arguments: list[str], status: int, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "speculators", *arguments], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert done.stdout.startswith(printed)
    assert bool(done.stderr) is bool(status)


def test_the_process_ends_with_its_status_after_all_is_printed_and_called() -> None:
    code = (
        "import atexit; from speculators import __main__\n"
        "def main(): atexit.register(print, 'called', end=''); print('printed'); raise {}\n"
        "__main__.main = main; __main__.run()"
    )
    for ending, status in (("SystemExit(3)", 3), ("SystemExit", 0), ("ValueError", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(ending)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (status, "printed\ncalled")
        assert ("ValueError" in done.stderr) is (status == 1)


# --quiet and --debug


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_quiet_logs_nothing(
    tmp_path: Path,
    verifier: Path,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    alone: bool,
) -> None:
    """Exhaustive: in a process of its own, which imports transformers."""
    monkeypatch.chdir(tmp_path)
    execute = run_process if alone else speculators
    run = execute("convert", "eagle", SOURCE, "out", verifier, "--quiet")
    assert (run.status, run.stdout, run.stderr) == (0, "", "")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_quiet_does_not_keep_errors_or_results_back(
    tmp_path: Path, speculators: CommandLine
) -> None:
    assert len(speculators("inspect", tmp_path / "none", "-q").errors) == 1
    assert speculators("inspect", SOURCE, "-q").stdout == speculators("inspect", SOURCE).stdout


@pytest.mark.parametrize("command", [("inspect", "x"), ("doctor",)], ids=" ".join)
def test_quiet_and_debug_exclude_each_other(
    speculators: CommandLine, command: tuple[str, ...]
) -> None:
    run = speculators(*command, "--quiet", "--debug")
    assert run.status == 2
    assert "exclude each other" in run.stderr


def test_debug_is_an_option_and_no_word_that_stands_anywhere(tmp_path: Path) -> None:
    """A directory called ``--debug`` is not mistaken for the option."""
    write_checkpoint(tmp_path / "--debug")
    (tmp_path / "--debug" / "config.json").unlink()
    run = run_process("inspect", "--", "--debug", cwd=tmp_path)
    assert run.status == 1
    assert len(run.errors) == 1
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("debug", [True, False])
def test_tracebacks_are_for_debug(tmp_path: Path, debug: bool) -> None:
    run = run_process("inspect", tmp_path / "none", *(["--debug"] if debug else []))
    assert run.status == 1
    assert ("Traceback (most recent call last)" in run.stderr) == debug
    assert len(run.errors) == (not debug)


def test_what_nobody_foresaw_is_one_sentence_too(
    monkeypatch: pytest.MonkeyPatch, speculators: CommandLine
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LookupError("no such thing\nand more")

    monkeypatch.setattr("speculators.inspection.checkpoint.inspect_checkpoint", fail)
    run = speculators("inspect", SOURCE)
    assert run.status == 1
    assert len(run.errors) == 1
    assert run.errors[0].startswith("This should not happen (LookupError: no such thing): run it")
    with pytest.raises(LookupError):
        speculators("inspect", SOURCE, "--debug")


# Colours, pipes


def test_colours_are_for_terminals_and_heed_no_color(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert COLOUR.search(on_a_terminal("inspect", missing))
    assert not COLOUR.search(on_a_terminal("inspect", missing, NO_COLOR="1"))
    assert COLOUR.search(on_a_terminal("--help"))
    assert not COLOUR.search(on_a_terminal("--help", NO_COLOR="1"))
    assert "\x1b" not in run_process("inspect", missing).stderr
    assert COLOUR.search(run_process("inspect", missing, FORCE_COLOR="1").stderr)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_on_a_terminal_lines_are_folded_and_nothing_is_cut(columns: int) -> None:
    shown = on_a_terminal("inspect", SOURCE, NO_COLOR="1", COLUMNS=str(columns))
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in shown.splitlines()]
    assert max(map(len, lines)) <= columns
    assert "…" not in shown
    squeezed = re.sub(r"\s", "", "".join(lines))
    assert "HASStrainsthesamemoduleinanotherway" in squeezed


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "inspect", str(SOURCE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1


# Completion


def completed(words: str) -> list[str]:
    """What bash would be offered for the last of ``words``."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN],
        env=os.environ
        | {
            "_SPECULATORS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_shell_completion() -> None:
    assert completed("speculators ins") == ["inspect"]
    families = {"dflash", "dflash2", "dspark", "eagle", "eagle3"}
    assert {*completed("speculators convert ")} == {*families, "auto"}
    assert "--json" in completed("speculators inspect --")
    assert {"--quiet", "--debug"} <= {*completed("speculators convert eagle --")}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAIN],
        env=os.environ | {"_SPECULATORS_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "_SPECULATORS_COMPLETE=complete_" in done.stdout
