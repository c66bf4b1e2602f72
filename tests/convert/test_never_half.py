"""Whatever happens, the output is unchanged or complete, and the next run cleans up."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import GOLDEN, PLAIN, WRITTEN, CommandLine, entries, write_checkpoint
from speculators.checkpoint.output import staging
from speculators.checkpoint.output.writer import write_safetensors_file
from speculators.convert.eagle import EagleConverter
from speculators.errors import CheckpointError, OutputError

convert = EagleConverter().convert
FORKS = Path(__file__).parents[1] / "stopped_conversions.py"
Forked = Callable[..., list[SimpleNamespace]]
ALL = ["fresh", "overwrite", "overwrite without swap"]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory, verifier: Path) -> Iterator[Forked]:
    """Asks a process of ``stopped_conversions`` for the outcomes of a job."""
    paths = [str(path) for path in (GOLDEN / PLAIN, verifier, tmp_path_factory.mktemp("forks"))]
    with subprocess.Popen(
        [sys.executable, str(FORKS), *paths],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def ask(*job: str) -> list[SimpleNamespace]:
            asked.write(json.dumps(job) + "\n")
            asked.flush()
            return [SimpleNamespace(**outcome) for outcome in json.loads(answers.readline())]

        yield ask
        asked.close()


# Stopped

KINDS = {
    *("before tempfile.mkdtemp", "before fcntl.flock", "before open", "before os.rmdir"),
    *(f"{when} {call}" for when in ("before", "after") for call in ("copy_file_range", "fsync")),
}
"""Kinds of moments that every conversion has."""

some_or_every_moment = pytest.mark.parametrize(
    ("moments", "least"),
    [
        ("some", 20),
        pytest.param("every", 50, marks=pytest.mark.exhaustive),
    ],
)


def kinds(outcomes: list[SimpleNamespace]) -> set[str]:
    return {" ".join(outcome.event.split()[:2]) for outcome in outcomes}


@pytest.mark.parametrize("scenario", ALL)
@some_or_every_moment
def test_killed_at_any_moment(forked: Forked, scenario: str, moments: str, least: int) -> None:
    """At the first and the last call of each function, and every rename; exhaustive: every call."""
    *killed, lived = forked("stop", "SIGKILL", moments, scenario)
    assert len(killed) >= least
    assert kinds(killed) >= KINDS
    assert {outcome.status for outcome in killed} == {-signal.SIGKILL}
    assert (lived.status, lived.output, lived.siblings) == (0, "first", 0)
    for outcome in killed:
        if scenario == "overwrite without swap" and outcome.output == "missing":
            # Between two renames, ``old`` holds the previous output; the next run puts it back.
            assert outcome.put_back == "before"
            assert outcome.event.startswith("before os.rename")
        else:
            assert outcome.output in {"before", "first"}, outcome.event
        assert outcome.next_status == 0, outcome.event
        assert outcome.next_output == "first", outcome.event
        assert outcome.next_siblings == 0, outcome.event
    outputs = [outcome.output for outcome in killed]
    assert {"before", "first"} <= set(outputs)
    assert outputs.count("missing") == (scenario == "overwrite without swap")


@pytest.mark.parametrize(
    ("number", "status", "scenario"),
    [
        ("SIGINT", 130, "fresh"),
        ("SIGTERM", 143, "overwrite"),
        ("SIGTERM", 143, "overwrite without swap"),
    ],
)
@some_or_every_moment
def test_told_to_stop_at_any_moment(
    forked: Forked, number: str, status: int, scenario: str, moments: str, least: int
) -> None:
    """Nothing is left, unless it is stopped while the sibling is being locked or removed.

    The moments are those of the test above.
    """
    *stopped, _ = forked("stop", number, moments, scenario)
    assert len(stopped) >= least
    assert kinds(stopped) >= KINDS
    assert {outcome.status for outcome in stopped} == {status}
    events = [outcome.event for outcome in stopped]
    removal = ("before shutil.rmtree", "before os.remove")
    removing = next(i for i, event in enumerate(events) if event.startswith(removal))
    for outcome in stopped[:removing]:
        assert set(outcome.errors) <= {"Interrupted.", "Terminated."}
        assert outcome.output in {"before", "first"}, outcome.event
        locking = "lock" in outcome.event
        assert outcome.siblings == 0 or locking, outcome.event
    for outcome in stopped:
        assert (outcome.next_status, outcome.next_output) == (0, "first"), outcome.event
        assert outcome.next_siblings == 0, outcome.event


# At once


@pytest.mark.parametrize("rounds", [4, pytest.param(12, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("scenario", ALL)
def test_two_conversions_to_one_output(forked: Forked, scenario: str, rounds: int) -> None:
    """Four times; exhaustive: twelve times."""
    for meeting in forked("meet", str(rounds), scenario):
        assert meeting.siblings == 0
        winners = [
            name
            for name, status in zip(("first", "second"), meeting.statuses, strict=True)
            if status == 0
        ]
        assert meeting.output in winners
        if scenario == "fresh":
            assert len(winners) == 1
        for status, errors in zip(meeting.statuses, meeting.errors, strict=True):
            assert (status, len(errors)) in {(0, 0), (1, 1)}


def test_a_run_that_goes_on_keeps_its_temporary_directory(tmp_path: Path, verifier: Path) -> None:
    with staging.staged_directory(tmp_path / "out") as theirs:
        (theirs / "config.json").write_text("{}")
        convert(GOLDEN / PLAIN, tmp_path / "out", verifier, validate=False)
        assert (theirs / "config.json").exists()
        with pytest.raises(OutputError, match="exists"):
            staging.check_output(tmp_path / "out", overwrite=False)
        (tmp_path / "out").rename(tmp_path / "ours")
    assert entries(tmp_path / "out") == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "out"]


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appears_in_the_last_moment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool, overwrite: bool
) -> None:
    """It appears after the last check, and before the rename."""
    output = tmp_path / "out"
    publish = staging._publish

    def too_late(sibling: Path, output: Path, *, overwrite: bool) -> None:
        output.mkdir()
        (output / "theirs.txt").write_text("x")
        publish(sibling, output, overwrite=False)

    monkeypatch.setattr(staging, "_publish", too_late)
    if not swaps:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    with (
        pytest.raises(OutputError, match="something else was put there meanwhile"),
        staging.staged_directory(output, overwrite=overwrite),
    ):
        pass
    assert entries(tmp_path) == ["out", "out/theirs.txt"]


# A file system that lacks something


def test_without_locks_it_goes_on_and_leaves_leftovers_alone(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    leftover = tmp_path / ".out.speculators-abc"
    leftover.mkdir()
    convert(GOLDEN / PLAIN, tmp_path / "out", verifier, validate=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [leftover.name, "out"]
    assert entries(tmp_path / "out") == WRITTEN


def test_where_directories_cannot_be_synced_files_are(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync

    def of_files_alone(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            raise OSError(22, "Invalid argument")
        synced.append(path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    convert(GOLDEN / PLAIN, tmp_path / "out", verifier, validate=False)
    assert sorted(synced) == WRITTEN


@pytest.mark.parametrize("what", ["missing", "failing", "copies nothing"])
def test_without_copying_by_the_kernel_the_bytes_are_the_same(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    by_kernel = convert(GOLDEN / PLAIN, tmp_path / "kernel", verifier, validate=False)

    def fail(*_: object, **__: object) -> int:
        if what == "failing":
            raise OSError(18, "Invalid cross-device link")
        return 0

    if what == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", fail)
    by_hand = convert(GOLDEN / PLAIN, tmp_path / "hand", verifier, validate=False)
    for name in WRITTEN:
        assert (by_hand / name).read_bytes() == (by_kernel / name).read_bytes()


# A disk that is full, or fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two converted checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("options", [[], ["--dtype", "float16"]])
def test_a_disk_that_is_full(
    small_disk: Path, verifier: Path, speculators: CommandLine, options: list[str]
) -> None:
    arguments = ("convert", "eagle", GOLDEN / PLAIN, small_disk / "out", verifier, "--no-validate")
    assert speculators(*arguments).status == 0
    before = {path.name: path.read_bytes() for path in (small_disk / "out").iterdir()}
    (small_disk / "filler").write_bytes(bytes(300_000))
    run = speculators(*arguments, "--overwrite", *options)
    assert run.status == 1
    assert len(run.errors) == 1
    assert "could not be written: it takes " in run.errors[0]
    assert " are free; make room there" in run.errors[0]
    assert {path.name: path.read_bytes() for path in (small_disk / "out").iterdir()} == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "out"]
    (small_disk / "filler").unlink()
    assert speculators(*arguments, "--overwrite").status == 0


@pytest.mark.parametrize("option", ["--no-validate", "--overwrite"])
def test_where_a_disk_is_mounted_nothing_else_can_be(
    tmp_path: Path, small_disk: Path, verifier: Path, speculators: CommandLine, option: str
) -> None:
    """A mount point, such as a container's volume, is refused before anything is written."""
    run = speculators("convert", "eagle", GOLDEN / PLAIN, small_disk, verifier, option)
    assert run.status == 1
    [error] = run.errors
    assert error.startswith(f"{small_disk} is where a file system is mounted")
    assert entries(tmp_path) == ["disk"]


@pytest.mark.parametrize("limit", [0, 100, 1000, 100_000])
def test_a_limit_on_the_size_of_files(tmp_path: Path, verifier: Path, limit: int) -> None:
    """``ulimit -f``, whose signal Python ignores."""
    done = subprocess.run(
        [sys.executable, "-c", "from speculators.__main__ import run; run()", "convert", "eagle"]
        + [str(path) for path in (GOLDEN / PLAIN, tmp_path / "new" / "out", verifier)]
        + ["--no-validate"],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    assert "File too large; raise the limit on the size of files (ulimit -f)" in done.stderr
    assert "Traceback" not in done.stderr
    assert entries(tmp_path) == []


def failing(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """Make ``call`` fail from the n-th time on."""
    left = [after]

    def fail(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return call(*arguments, **options)

    return fail


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("options", [[], ["--dtype", "float16"]])
def test_a_source_that_cannot_be_read_half_way(
    tmp_path: Path,
    verifier: Path,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    options: list[str],
) -> None:
    arguments = ("convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, *options)
    monkeypatch.setattr(os, "copy_file_range", failing(os.copy_file_range, after))
    # If the kernel cannot copy, reading is tried, and shows what is wrong.
    monkeypatch.setattr(os, "pread", failing(os.pread, after if options else 0))
    run = speculators(*arguments, "--no-validate")
    assert run.status == 1
    [error] = run.errors
    assert error.startswith(f"{GOLDEN / PLAIN / 'model.safetensors'} cannot be read within the ")
    assert "Input/output error" in error
    assert entries(tmp_path) == []


def test_a_disk_that_cannot_be_written_half_way(
    tmp_path: Path, verifier: Path, speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", failing(os.copy_file_range, 3))
    monkeypatch.setattr(os, "write", failing(os.write, 2))
    run = speculators(
        "convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, "--no-validate"
    )
    assert run.status == 1
    [error] = run.errors
    assert error.startswith(f"{tmp_path / 'out'} could not be written: Input/output error; ")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_source_that_is_cut_off_while_it_is_copied(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    """Another process truncates it after its header was read."""
    from speculators.convert import conversion

    source = write_checkpoint(tmp_path / "source")

    def cut(*arguments: Any, **options: Any) -> None:
        os.truncate(source / "model.safetensors", 150_000)
        write_safetensors_file(*arguments, **options)

    monkeypatch.setattr(conversion, "write_safetensors_file", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was written to \(it had"):
        convert(source, tmp_path / "out", verifier, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
