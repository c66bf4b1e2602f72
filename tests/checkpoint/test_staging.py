"""What is beside the output and within it stays, unless it is a leftover of our own."""

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import entries
from speculators.checkpoint.output import staging
from speculators.checkpoint.output.staging import check_output, staged_directory
from speculators.errors import OutputError

MARKER = '{"speculators_model_type": "eagle"}'


def write(output: Path, *, overwrite: bool = False) -> None:
    with staged_directory(output, overwrite=overwrite) as staging:
        (staging / "config.json").write_text(MARKER)
        (staging / "new.txt").write_text("new")


def existing(output: Path) -> Path:
    """A converted checkpoint, which may be replaced."""
    (output / "sub").mkdir(parents=True)
    (output / "config.json").write_text(MARKER)
    (output / "sub" / "old.txt").write_text("old")
    return output


def mounted(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


def unmount(place: Path) -> None:
    subprocess.run(["umount", str(place)], check=True)


NEW = ["config.json", "new.txt"]
OLD = ["config.json", "sub", "sub/old.txt"]


# Leftovers


def leftover(output: Path, name: str = "abcdef_1") -> Path:
    """What a run leaves that was killed."""
    sibling = output.with_name(f".{output.name}.speculators-{name}")
    (sibling / "new").mkdir(parents=True)
    (sibling / "new" / "config.json").write_text("half")
    (sibling / "lock").touch()
    sibling.chmod(0o700)
    return sibling


def test_a_leftover_is_removed(tmp_path: Path) -> None:
    leftover(tmp_path / "out")
    (tmp_path / ".out.speculators-abcdef_2").mkdir(mode=0o700)  # killed at its very start
    write(tmp_path / "out")
    assert entries(tmp_path) == ["out", *(f"out/{name}" for name in NEW)]


def link(sibling: Path) -> None:
    target = sibling.rename(sibling.with_name("theirs"))
    sibling.symlink_to(target)


def without_lock(sibling: Path) -> None:
    (sibling / "lock").unlink()


def lock_is_a_link(sibling: Path) -> None:
    (sibling / "lock").unlink()
    (sibling.parent / "precious").write_text("theirs")
    (sibling / "lock").symlink_to(sibling.parent / "precious")


def with_more(sibling: Path) -> None:
    (sibling / "notes.txt").write_text("theirs")


def new_is_a_file(sibling: Path) -> None:
    (sibling / "new" / "config.json").unlink()
    (sibling / "new").rmdir()
    (sibling / "new").write_text("theirs")


def new_is_a_link(sibling: Path) -> None:
    (sibling / "new").rename(sibling.parent / "theirs")
    (sibling / "new").symlink_to(sibling.parent / "theirs")


def emptied(sibling: Path) -> None:
    (sibling / "lock").unlink()
    new_is_a_file(sibling)
    (sibling / "new").unlink()
    sibling.chmod(0o755)


@pytest.mark.parametrize(
    "change",
    [link, without_lock, lock_is_a_link, with_more, new_is_a_file, new_is_a_link, emptied],
)
def test_what_is_not_quite_a_leftover_stays(tmp_path: Path, change: object) -> None:
    assert callable(change)
    change(leftover(tmp_path / "out"))
    before = entries(tmp_path)
    write(tmp_path / "out")
    assert entries(tmp_path) == sorted([*before, "out", *(f"out/{name}" for name in NEW)])


@pytest.mark.parametrize("name", ["notes", "abcdefgh9", "ABCDEFGH", "abcdefg", "abcdef-1"])
def test_a_name_of_another_form_stays(tmp_path: Path, name: str) -> None:
    sibling = leftover(tmp_path / "out", name)
    write(tmp_path / "out")
    assert (sibling / "new" / "config.json").read_text() == "half"


def test_what_somebody_else_owns_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sibling = leftover(tmp_path / "out")
    monkeypatch.setattr(os, "geteuid", lambda: sibling.stat().st_uid + 1)
    write(tmp_path / "out")
    assert (sibling / "new" / "config.json").read_text() == "half"


def test_a_name_with_the_characters_of_a_pattern(tmp_path: Path) -> None:
    other = leftover(tmp_path / "oXt")
    leftover(tmp_path / "o.t")
    write(tmp_path / "o.t")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "o.t"]


# Mounts


@pytest.mark.parametrize("below", ["sub", "sub/deep er"])
@pytest.mark.parametrize("bound", [False, True])
def test_an_output_with_a_mount_in_it_is_not_replaced(
    tmp_path: Path, below: str, bound: bool
) -> None:
    """Also where a directory of the same file system is bound, which has the same device."""
    output, place = existing(tmp_path / "out"), tmp_path / "out" / below
    place.mkdir(exist_ok=True)
    (tmp_path / "data").mkdir()
    source = ["--bind", str(tmp_path / "data")] if bound else ["-t", "tmpfs", "tmpfs"]
    mounted(*source, str(place))
    try:
        (place / "precious").write_text("theirs")
        with pytest.raises(OutputError, match=rf"holds {place}, where a file system is mounted"):
            write(output, overwrite=True)
        with pytest.raises(OutputError, match="is where a file system is mounted"):
            write(place, overwrite=True)
        assert (place / "precious").read_text() == "theirs"
    finally:
        unmount(place)
    write(output, overwrite=True)
    assert entries(output) == NEW
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_is_bound_is_a_mount(tmp_path: Path) -> None:
    output = existing(tmp_path / "out")
    (tmp_path / "precious").write_text("theirs")
    mounted("--bind", str(tmp_path / "precious"), str(output / "sub" / "old.txt"))
    try:
        with pytest.raises(OutputError, match=r"old\.txt, where a file system is mounted"):
            check_output(output, overwrite=True)
    finally:
        unmount(output / "sub" / "old.txt")


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """An overlay whose lower layer has a converted checkpoint, and an empty directory."""
    lower, upper, work, place = (tmp_path / it for it in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, place):
        directory.mkdir()
    existing(lower / "out")
    (lower / "empty").mkdir()
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted("-t", "overlay", "overlay", "-o", layers, str(place))
    try:
        yield place
    finally:
        unmount(place)


def test_a_directory_of_a_lower_layer_is_replaced(overlay: Path) -> None:
    with pytest.raises(OSError, match="cross-device") as caught:
        (overlay / "out").rename(overlay / "renamed")
    assert caught.value.errno == errno.EXDEV
    write(overlay / "out", overwrite=True)
    write(overlay / "empty")
    found = entries(overlay)
    assert found == ["empty", *(f"empty/{it}" for it in NEW), "out", *(f"out/{it}" for it in NEW)]
    write(overlay / "out", overwrite=True)  # now it is of the upper layer


@pytest.fixture
def unmovable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output that cannot be renamed, on any file system."""
    output = existing(tmp_path / "out")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self == output and (self / "sub").exists():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    def cannot(_one: Path, _other: Path) -> bool:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(staging, "_exchange", cannot)
    return output


def test_a_directory_that_cannot_be_renamed_is_replaced(unmovable: Path) -> None:
    write(unmovable, overwrite=True)
    assert entries(unmovable.parent) == ["out", *(f"out/{name}" for name in NEW)]


@pytest.mark.parametrize("step", ["copy", "remove", "half removed", "rename"])
def test_a_directory_that_cannot_be_renamed_is_put_back(
    unmovable: Path, monkeypatch: pytest.MonkeyPatch, log: list[str], step: str
) -> None:
    """Whatever fails, the previous output is there again, as it was."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def remove(directory: Path) -> list[OSError]:
        if directory == unmovable:
            if step == "half removed":
                (unmovable / "sub" / "old.txt").unlink()
            return [OSError(errno.EIO, "Input/output error")]
        return remove_tree(directory)

    remove_tree, rename = staging._remove_tree, Path.rename
    if step == "copy":
        monkeypatch.setattr(shutil, "copytree", fail)
    elif step == "rename":
        monkeypatch.setattr(
            Path, "rename", lambda a, b: fail() if a.name == "new" else rename(a, b)
        )
    else:
        monkeypatch.setattr(staging, "_remove_tree", remove)
    with pytest.raises(OutputError, match="Input/output error"):
        write(unmovable, overwrite=True)
    assert entries(unmovable.parent) == ["out", *(f"out/{name}" for name in OLD)]
    assert ("WARNING" in "".join(log)) == (step != "copy")


def test_a_run_that_was_killed_while_it_replaced_by_copy(tmp_path: Path) -> None:
    """The next run puts the copy back, but not over what somebody else has put there."""
    for extra in (None, "theirs.txt"):
        output = existing(tmp_path / "out")
        sibling = leftover(output)
        output.rename(sibling / "copy")
        (output / "sub").mkdir(parents=True)
        if extra:
            (output / extra).write_text("theirs")
        with pytest.raises(OutputError, match="exists"):
            write(output)
        assert entries(tmp_path)[1:] == sorted(
            f"out/{name}" for name in ([extra, "sub"] if extra else OLD)
        )
        shutil.rmtree(output)


# What cannot be removed


def test_it_is_told_when_the_old_one_cannot_be_removed_whole(
    tmp_path: Path, log: list[str]
) -> None:
    output = existing(tmp_path / "out")
    kept = output / "sub" / "old.txt"
    done = subprocess.run(["chattr", "+i", str(kept)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("a file cannot be made immutable here")
    try:
        write(output, overwrite=True)
        assert entries(output) == NEW
        [sibling] = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        kept = sibling / "new" / "sub" / "old.txt"
        [warning] = [line for line in log if line.startswith("WARNING")]
        assert warning.startswith(f"WARNING {sibling} could not be removed completely (")
        assert f"a part of {output}; remove it yourself" in warning
    finally:
        subprocess.run(["chattr", "-i", str(kept)], check=True)
    write(output, overwrite=True)  # which can remove it now
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Odd paths


def test_an_output_that_leads_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "missing" / ".." / "out")
    assert entries(tmp_path) == ["out", *(f"out/{name}" for name in NEW)]
    with pytest.raises(OutputError, match="exists; choose another output, or replace it with"):
        check_output(tmp_path / "missing" / ".." / "out", overwrite=False)
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    for output in ("..", ".", "sub/.."):
        monkeypatch.chdir(tmp_path / "empty" / ("sub" if output == ".." else ""))
        with pytest.raises(OutputError, match="exists"):
            write(Path(output))
    monkeypatch.chdir(tmp_path / "empty" / "sub")
    write(Path())
    monkeypatch.chdir(tmp_path)
    assert entries(tmp_path / "empty") == ["sub", *(f"sub/{name}" for name in NEW)]


def test_a_path_with_a_nul(tmp_path: Path) -> None:
    for act in (lambda it: check_output(it, overwrite=False), write):
        with pytest.raises(
            OutputError, match=r"a\\x00b contains a NUL character; choose another output"
        ):
            act(tmp_path / "a\0b")


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    sibling = leftover(tmp_path / "out")
    with (sibling / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(tmp_path / "out")
        assert (sibling / "new" / "config.json").read_text() == "half"
