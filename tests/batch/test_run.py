"""Batches run by the command line: their outcomes, and how they are stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import (
    GOLDEN,
    PLAIN,
    WRITTEN,
    CommandLine,
    Run,
    entries,
    fork_processes,
    run_process,
    write_checkpoint,
)
from hub_server import HubServer, hub_environment


@pytest.fixture
def write_manifest(tmp_path: Path, verifier: Path) -> Callable[..., Path]:
    """Write a manifest of entries that are not validated, and so need no torch."""

    def write(*changes: dict[str, Any]) -> Path:
        basis = {"input": str(GOLDEN / PLAIN), "base_model": str(verifier), "validate": False}
        file = tmp_path / "batch.yaml"
        file.write_text(yaml.safe_dump([basis | change for change in changes]))
        return file

    return write


def rows(run: Run) -> list[list[str]]:
    """The rows of the table of outcomes, without the column of seconds."""
    table = run.stdout.split("\n\n", maxsplit=1)[0].splitlines()
    assert table[0].split() == ["entry", "output", "outcome", "seconds", "error", "or", "URL"]
    cells = [re.split(r"\s{2,}", line) for line in table[1:]]
    return [[cell for cell in row if not re.fullmatch(r"\d+\.\d", cell)] for row in cells]


def summary(run: Run) -> str:
    return run.stdout.splitlines()[-1]


def test_a_failure_does_not_stop_the_rest(
    tmp_path: Path, write_manifest: Callable[..., Path], speculators: CommandLine
) -> None:
    bad = write_checkpoint(tmp_path / "bad", edit=lambda tensors: tensors.pop("fc.weight"))
    manifest = write_manifest(
        {"output": "out/one"},
        {"output": "out/bad", "input": str(bad)},
        {"output": "out/two", "dtype": "bfloat16"},
    )
    run = speculators("convert", "eagle", "--manifest", manifest, "--jobs", "2")
    assert run.status == 1
    first, failed, second = rows(run)
    assert first == ["1", str(tmp_path / "out/one"), "converted"]
    assert second == ["3", str(tmp_path / "out/two"), "converted"]
    assert failed[:3] == ["2", str(tmp_path / "out/bad"), "failed"]
    assert "fc.weight" in failed[3]
    assert summary(run) == "2 converted, 1 failed."
    assert entries(tmp_path / "out") == sorted(
        ["one", "two", *(f"{name}/{file}" for name in ("one", "two") for file in WRITTEN)]
    )
    # Each line of the log names its entry.
    assert run.messages[0] == "3 of 3 are to be done"
    assert f"[1/3 one] Saved to: {tmp_path / 'out/one'}" in run.messages
    assert f"[2/3 bad] {failed[3]}" in run.errors
    assert all(re.match(r"\[\d/3 (one|two|bad)\] ", line) for line in run.messages[1:])


def test_a_second_run_does_what_is_missing(
    tmp_path: Path,
    write_manifest: Callable[..., Path],
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_processes(monkeypatch)
    manifest = write_manifest({"output": "one"})
    assert speculators("convert", "eagle", "--manifest", manifest).status == 0
    before = (tmp_path / "one" / "conversion.json").stat().st_mtime_ns

    manifest = write_manifest({"output": "one"}, {"output": "two"})
    asked = speculators("convert", "eagle", "--manifest", manifest, "--dry-run")
    assert (asked.status, summary(asked)) == (0, "1 to do, 1 done before.")
    assert not (tmp_path / "two").exists()

    run = speculators("convert", "eagle", "--manifest", manifest)
    assert (run.status, summary(run)) == (0, "1 done before, 1 converted.")
    assert (tmp_path / "one" / "conversion.json").stat().st_mtime_ns == before
    assert not [line for line in run.messages if "[1/2 one]" in line]


def test_another_conversion_at_the_output_is_replaced_only_if_asked(
    tmp_path: Path,
    write_manifest: Callable[..., Path],
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_processes(monkeypatch)
    speculators("convert", "eagle", "--manifest", write_manifest({"output": "one"}))
    other = {"output": "one", "dtype": "float16"}
    refused = speculators("convert", "eagle", "--manifest", write_manifest(other))
    assert refused.status == 1
    assert rows(refused)[0][3] == (
        f"{tmp_path / 'one'} exists, and is not what this entry makes: its dtype was kept; choose "
        "another output, or set overwrite if it is a converted checkpoint."
    )
    run = speculators("convert", "eagle", "--manifest", write_manifest(other | {"overwrite": True}))
    assert (run.status, summary(run)) == (0, "1 converted.")
    assert f"Replacing {tmp_path / 'one'}: its dtype was kept" in run.messages


@pytest.mark.parametrize("forking", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_validation_runs_in_the_batch_too(
    tmp_path: Path,
    write_manifest: Callable[..., Path],
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    forking: bool,
) -> None:
    """In a fork of this process, which has torch; exhaustive: in one that imports it."""
    if forking:
        fork_processes(monkeypatch)
    run = speculators(
        "convert", "eagle", "--manifest", write_manifest({"output": "one", "validate": True})
    )
    assert run.status == 0
    assert "[1/1 one] Forward pass successful" in run.messages


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing argument 'INPUT'."),
        (["in", "out"], "Missing argument 'BASE_MODEL'."),
        (["in", "out", "base", "--jobs", "2"], "--jobs only works with --manifest."),
        (["--manifest", "m.yaml", "in"], "with --manifest, INPUT belongs in the manifest"),
        (["--manifest", "m.yaml", "--no-validate"], "with --manifest, --no-validate belongs"),
        (["--manifest", "m.yaml", "--dtype", "float16"], "with --manifest, --dtype belongs"),
        (["--manifest", "m.yaml", "--jobs", "0"], "Invalid value for '--jobs'"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    speculators: CommandLine, arguments: list[str], expected: str
) -> None:
    run = speculators("convert", "eagle", *arguments)
    assert run.status == 2
    assert expected in " ".join(run.stderr.replace("│", " ").split())


def test_a_wrong_manifest_is_an_error(tmp_path: Path, speculators: CommandLine) -> None:
    run = speculators("convert", "eagle", "--manifest", tmp_path / "none.yaml")
    assert run.status == 1
    assert run.errors == [f"{tmp_path / 'none.yaml'} cannot be read: No such file or directory."]
    assert not run.stdout


def test_only_what_validates_needs_torch(
    tmp_path: Path, write_manifest: Callable[..., Path]
) -> None:
    """Neither the process that runs a batch nor those that convert load it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    run = run_process(
        "convert", "eagle", "--manifest", write_manifest({"output": "one"}),
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )  # fmt: skip
    assert (run.status, summary(run)) == (0, "1 converted.")


# Being stopped, and dying


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[HubServer, dict[str, str]]]:
    with HubServer() as server:
        yield server, hub_environment(server, tmp_path / "cache")


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def start(manifest: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """Start a batch in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [
            sys.executable, "-c", "from speculators.cli import main; main()",
            "convert", "eagle", "--manifest", str(manifest), *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        start_new_session=True,
    )  # fmt: skip


def processes(group: int) -> list[int]:
    """The processes of a group, by its leader, without the leader."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
        except OSError:
            continue  # it has just ended
        if int(rest.rpartition(") ")[2].split()[2]) == group and int(pid) != group:
            found.append(int(pid))
    return found


WAITING = """
import sys, time, types
from pathlib import Path
def validate_conversion(*_, **__):
    Path("{marker}").touch()
    time.sleep(300)
stand_in = types.SimpleNamespace(validate_conversion=validate_conversion)
sys.modules["speculators.convert.validation"] = stand_in
"""
"""Makes validation wait in every process that finds it as ``sitecustomize``."""

IMPORTED = 'sys.modules["speculators.models.loading"] = stand_in\n'
"""Keeps such a process from importing what validation needs."""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
@pytest.mark.parametrize("importing", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("number", "whom", "status"),
    [
        (signal.SIGINT, os.killpg, 130),  # Ctrl-C: the terminal tells the whole group
        (signal.SIGTERM, os.kill, 143),
    ],
)
def test_stopping_clears_up(
    tmp_path: Path,
    write_manifest: Callable[..., Path],
    number: signal.Signals,
    whom: Callable[[int, int], None],
    status: int,
    importing: bool,
) -> None:
    """Stop while one entry validates and one is waiting; exhaustive: while torch is imported."""
    site, marker = tmp_path / "site", tmp_path / "validating"
    site.mkdir()
    waiting = WAITING.format(marker=marker) + IMPORTED * (not importing)
    (site / "sitecustomize.py").write_text(waiting)
    manifest = write_manifest(
        {"output": "out/one"}, {"output": "out/slow", "validate": True}, {"output": "out/last"}
    )
    process = start(manifest, {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])})
    wait_for(marker.exists)
    staged = [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".slow.")]
    assert len(staged) == 1
    whom(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    run = Run(process.returncode, stdout, stderr)
    assert run.status == status
    assert [row[2] for row in rows(run)] == ["converted", "stopped", "to do"]
    assert summary(run) == "1 to do, 1 converted, 1 stopped."
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one"]
    wait_for(lambda: not processes(process.pid))
    assert "Traceback" not in stderr


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_a_process_that_is_killed_takes_no_other_one_along(
    tmp_path: Path, write_manifest: Callable[..., Path], hub: tuple[HubServer, dict[str, str]]
) -> None:
    server, environment = hub
    server.add_repo("org/draft", GOLDEN / PLAIN)
    server.fail("config.json", delay=300)
    manifest = write_manifest({"output": "slow", "input": "org/draft"}, {"output": "one"})
    process = start(manifest, environment)
    wait_for(lambda: "config.json" in server.fetched)
    for pid in processes(process.pid):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    run = Run(process.returncode, stdout, stderr)
    assert run.status == 1
    assert [row[2] for row in rows(run)] == ["failed", "converted"]
    assert rows(run)[0][3] == (
        "Its process was killed; perhaps memory ran out: try again with fewer --jobs."
    )
