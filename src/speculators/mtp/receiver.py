"""Write a verifier's checkpoint with another MTP, beside the old one or in its place.

Engines read every tensor of every shard that the index names. So a shard that holds tensors of an
earlier MTP is written again without them; all others stay the files that they are.

In place, nothing that the verifier's index names is touched before the new index has taken the old
one's place, in one step: new shards get names that are free, and old ones go last. A run that is
killed leaves a verifier that loads, with the old MTP or with the new one. The next graft in place
removes what else it left: a temporary directory, and the shards that a hidden file lists and the
index does not name.
"""

import fcntl
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.output.links import copy, link_or_copy
from speculators.checkpoint.output.staging import (
    staged_directory,
    sync,
    sync_directory,
    working_directory,
)
from speculators.checkpoint.output.writer import write_safetensors_file
from speculators.checkpoint.progress import Progress
from speculators.checkpoint.tensor import PlannedTensor, TensorInfo
from speculators.errors import OutputError
from speculators.mtp.config import write_json
from speculators.mtp.numbers import finite

__all__ = ["WEIGHTS", "Plan", "Receiver", "clear_up", "write_copy", "write_in_place"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
"""The name of a file of weights that needs no index."""

JOURNAL = ".speculators-graft.json"
"""In a verifier that is changed in place: the shards that come and go. It is locked meanwhile."""

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
"""The suffixes of files that are linked. All others may be edited later, so they are copied."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """The verifier that gets an MTP.

    Attributes:
        directory: where it is.
        config: its config.json.
        tensors: all its tensors.
        index: its index; empty if it has one file without an index.

    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    index: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written.

    Attributes:
        shard: the tensors of the new MTP.
        before: the names of those of an earlier one.
        texts: name of a file → the JSON that takes its place.

    """

    shard: dict[str, PlannedTensor]
    before: set[str]
    texts: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Files:
    """Which file of the verifier becomes which.

    Attributes:
        kept: old name → new name of the shards that stay as they are.
        written: name → tensors of the shards that are written.
        obsolete: the names of the shards that are no longer needed under these names.
        index: the new index.

    """

    kept: dict[str, str]
    written: dict[str, dict[str, PlannedTensor]]
    obsolete: set[str]
    index: dict[str, Any]


def write_copy(receiver: Receiver, plan: Plan, output: Path, progress: Progress) -> None:
    """Create a directory with the verifier and its new MTP.

    Raises:
        CheckpointError: if a file of the verifier changed meanwhile, or the MTP has numbers that
            are not finite.
        OutputError: if the directory exists, or cannot be written.

    """
    files = _lay_out(receiver, plan, in_place=False)
    identities = {info.file.name: info.identity for info in receiver.tensors.values()}
    with staged_directory(output, marker=None) as staging:
        for old, new in files.kept.items():
            link_or_copy(receiver.directory / old, staging / new, identities[old])
        replaced = {*files.kept, *files.obsolete, *files.written, *plan.texts, INDEX}
        _carry(receiver.directory, staging, replaced)
        _write(files, plan, staging, progress)


def clear_up(directory: Path) -> None:
    """Remove what an earlier run in place has left that was killed.

    Raises:
        CheckpointError: if its list or the verifier's index cannot be read.
        OutputError: if that run is still going on, or something cannot be removed.

    """
    journal, index = directory / JOURNAL, directory / INDEX
    if not journal.is_file():
        return
    try:
        with journal.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            named = {SINGLE}
            if index.is_file():
                named = set(read_json(index).get("weight_map", {}).values())
            for name in read_json(journal).get("shards", []):
                path = directory / Path(name).name
                if path.suffix == ".safetensors" and path.name not in named:
                    path.unlink(missing_ok=True)
            journal.unlink()
    except BlockingIOError as error:
        raise OutputError(f"Another graft is changing {directory}; wait for it.") from error
    except OSError as error:
        raise OutputError(f"{directory} cannot be written to: {error.strerror}.") from error


def write_in_place(receiver: Receiver, plan: Plan, progress: Progress) -> None:
    """Change the verifier's own directory.

    Raises:
        CheckpointError: if a file of the verifier changed meanwhile, or the MTP has numbers that
            are not finite.
        OutputError: if the directory cannot be changed.

    """
    directory = receiver.directory
    files = _lay_out(receiver, plan, in_place=True)
    with working_directory(directory, "graft") as staging:
        _write(files, plan, staging, progress)
        renamed = [new for old, new in files.kept.items() if old != new]
        shards = [*files.written, *renamed, *sorted(files.obsolete)]
        write_json(staging / JOURNAL, {"shards": shards})
        sync(staging)
        with _locked(staging / JOURNAL):
            with _undone_unless_finished(directory, staging, plan.texts) as added:
                added.append(directory / JOURNAL)
                (staging / JOURNAL).rename(directory / JOURNAL)
                sync_directory(directory)
                _move_in(files, plan, staging, directory, added)
            sync_directory(directory)
            for name in files.obsolete:
                (directory / name).unlink(missing_ok=True)
            (directory / JOURNAL).unlink()


def _move_in(files: _Files, plan: Plan, staging: Path, directory: Path, added: list[Path]) -> None:
    """Put the new files into a verifier, the index last; ``added`` gets what was not there."""
    for name in files.written:
        added.append(directory / name)
        (staging / name).rename(directory / name)
    for old, new in files.kept.items():
        if old != new:
            added.append(directory / new)
            link_or_copy(directory / old, directory / new)
    for name in plan.texts:
        (staging / name).replace(directory / name)
    sync_directory(directory)
    (staging / INDEX).replace(directory / INDEX)


@contextmanager
def _locked(journal: Path) -> Iterator[None]:
    """Keep the list of shards locked, also where it is moved to."""
    with journal.open() as opened:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


@contextmanager
def _undone_unless_finished(
    directory: Path, staging: Path, texts: Mapping[str, Any]
) -> Iterator[list[Path]]:
    """If the context raises, remove the files that it adds, and put texts back.

    Not so once the new index is in its place: then these files belong to the verifier.
    """
    added: list[Path] = []
    for name in texts:
        copy(directory / name, staging / f"before-{name}")
    try:
        yield added
    except BaseException:
        if not (staging / INDEX).exists():
            raise
        for path in added:
            path.unlink(missing_ok=True)
        for name in texts:
            (staging / f"before-{name}").replace(directory / name)
        raise


def _lay_out(receiver: Receiver, plan: Plan, *, in_place: bool) -> _Files:
    shards: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in receiver.tensors.items():
        shards[info.file.name][name] = info
    taken = {it.name for it in receiver.directory.iterdir()}
    kept: dict[str, str] = {}
    written: dict[str, dict[str, PlannedTensor]] = {}
    obsolete = set()
    weight_map: dict[str, str] = {}
    for shard, tensors in sorted(shards.items()):
        left = {name: info for name, info in tensors.items() if name not in plan.before}
        whole = len(left) == len(tensors)
        # A single file would be read without the index.
        if shard == SINGLE or (in_place and not whole):
            new = _free_name(f"{Path(shard).stem}-body", taken)
        else:
            new = shard
        if whole:
            kept[shard] = new
        elif left:
            written[new] = {name: PlannedTensor.copy_of(info) for name, info in left.items()}
        if new != shard or not left:
            obsolete.add(shard)
        weight_map |= dict.fromkeys(left, new)
    mtp = _free_name("model-mtp", taken if in_place else taken - obsolete)
    written = {mtp: plan.shard, **written}
    weight_map |= dict.fromkeys(plan.shard, mtp)
    return _Files(kept, written, obsolete, _index(receiver, plan, weight_map))


def _free_name(stem: str, taken: set[str]) -> str:
    """The first of STEM.safetensors, STEM-2.safetensors, ... that no file has."""
    name, number = f"{stem}.safetensors", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.safetensors"
    return name


def _index(receiver: Receiver, plan: Plan, weight_map: dict[str, str]) -> dict[str, Any]:
    """The verifier's index with other entries; its totals are those of the new tensors."""
    left = [info for name, info in receiver.tensors.items() if name not in plan.before]
    said = receiver.index.get("metadata")
    metadata = dict(said) if isinstance(said, dict) else {}
    new = plan.shard.values()
    metadata["total_size"] = sum(it.nbytes for it in left) + sum(it.nbytes for it in new)
    if isinstance(parameters := metadata.get("total_parameters"), int):
        before = sum(receiver.tensors[name].elements for name in plan.before)
        metadata["total_parameters"] = parameters - before + sum(it.elements for it in new)
    return {
        **receiver.index,
        "metadata": metadata,
        "weight_map": dict(sorted(weight_map.items())),
    }


def _write(files: _Files, plan: Plan, folder: Path, progress: Progress) -> None:
    for name, tensors in files.written.items():
        look = finite if tensors is plan.shard else None
        write_safetensors_file(folder / name, tensors, progress=progress, look=look)
    for name, text in plan.texts.items():
        write_json(folder / name, text)
    write_json(folder / INDEX, files.index)


def _carry(source: Path, target: Path, without: set[str]) -> None:
    """Take over the other files of a directory and of its folders, but none that is hidden."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in without:
            continue
        if path.is_dir():
            (target / path.name).mkdir()
            _carry(path, target / path.name, set())
        elif path.is_file():
            take = link_or_copy if path.suffix in WEIGHTS else copy
            take(path, target / path.name)
