"""Write a verifier's checkpoint with another MTP, beside the old one or in its place.

Engines read every tensor of every shard that the index names. So a shard that holds tensors of an
earlier MTP is written again without them; all others stay the files that they are.

In place, nothing that the verifier's index names is touched before the new index has taken the old
one's place, in one step: new shards get names that are free, and old ones go last. A run that is
killed leaves a verifier that loads, with the old MTP or with the new one. The next graft in place
removes what else it left: a temporary directory, and what the journal lists (``journal``).
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from speculators.mtp.config import write_json
from speculators.mtp.journal import INDEX, JOURNAL, kept, locked, settle, write_journal
from speculators.mtp.numbers import finite

__all__ = ["WEIGHTS", "Plan", "Receiver", "write_copy", "write_in_place"]

SINGLE = "model.safetensors"
"""The name of a file of weights that needs no index."""

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
        write_journal(staging, [*files.written, *renamed], sorted(files.obsolete), plan.texts)
        for name in plan.texts:
            copy(directory / name, staging / kept(name))
        sync(staging)
        with locked(staging / JOURNAL), _settled(directory):
            (staging / JOURNAL).rename(directory / JOURNAL)
            sync_directory(directory)
            _move_in(files, plan, staging, directory)


def _move_in(files: _Files, plan: Plan, staging: Path, directory: Path) -> None:
    """Put the new files into a verifier, the index last."""
    for name in files.written:
        (staging / name).rename(directory / name)
    for old, new in files.kept.items():
        if old != new:
            link_or_copy(directory / old, directory / new)
    for name in plan.texts:
        (staging / kept(name)).rename(directory / kept(name))
    sync_directory(directory)
    for name in plan.texts:
        (staging / name).replace(directory / name)
    sync_directory(directory)
    (staging / INDEX).replace(directory / INDEX)
    sync_directory(directory)


@contextmanager
def _settled(directory: Path) -> Iterator[None]:
    """Whether the context ends or raises, remove what the index then does not name."""
    try:
        yield
    finally:
        if (directory / JOURNAL).exists():
            settle(directory)


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
