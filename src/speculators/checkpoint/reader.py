"""Read the config and the table of tensors of a repository, but not the tensors' data."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from loguru import logger

from speculators.checkpoint.files.json_file import read_json
from speculators.checkpoint.files.safetensors_file import read_safetensors_file
from speculators.checkpoint.files.torch_file import read_torch_file
from speculators.checkpoint.folders import deepspeed_weights, describe_folder
from speculators.checkpoint.identity import FileIdentity
from speculators.checkpoint.repository import LocalDirectory, Repository
from speculators.checkpoint.tensor import TensorInfo, check_name
from speculators.errors import CheckpointError, NotFetchedError, NoWeightsError, printable

__all__ = [
    "Checkpoint",
    "Companion",
    "find_companions",
    "read_checkpoint",
    "read_config",
    "read_names",
    "read_tensors",
]


MAX_FILENAME = 255


@dataclass(frozen=True, slots=True)
class Container:
    """A file format for tensors.

    Attributes:
        filename: the name of the file if it is the only one.
        suffixes: the suffixes of files in this format.
        in_parts: whether single tensors can be fetched from a file, see ``Repository.part``.
        read: lists the tensors that a file holds.

    """

    filename: str
    suffixes: tuple[str, ...]
    in_parts: bool
    read: Callable[[Path], dict[str, TensorInfo]]


INDEX = ".index.json"
"""The suffix of a file that says which tensors are in which shard."""

CONTAINERS = (
    Container("model.safetensors", (".safetensors",), True, read_safetensors_file),
    Container("pytorch_model.bin", (".bin", ".pt", ".pth", ".ckpt"), False, read_torch_file),
)
WEIGHTS = {
    filename: container
    for container in CONTAINERS
    for filename in (container.filename, container.filename + INDEX)
}
"""Name of a weight file or index → its format, in order of preference: the first found is read."""


PARTS = {
    ".lora_A.": (
        "a LoRA adapter",
        "merge it into the checkpoint that it was trained on (merge_and_unload of PEFT)",
    ),
    "_flat_param": (
        "flattened shards of FSDP",
        "let the trainer save a full state dict (FSDP's FULL_STATE_DICT)",
    ),
}
"""Part of a tensor's name → what shows itself by it, and what to do to get whole weights."""

ELSEWHERE = re.compile("|".join(map(re.escape, PARTS)))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A config and a table of tensors, as they were read."""

    repository: Repository
    """Where the files are."""

    config: dict[str, Any]
    config_file: Path
    tensors: dict[str, TensorInfo]

    config_identity: FileIdentity | None = None
    """What ``config_file`` was when it was read."""

    companions: Mapping[str, "Companion"] = field(default_factory=dict)
    """Name of a file beside the weights that belongs to the draft, too → the file."""

    @property
    def name(self) -> str:
        """What the user called it: a path or a Hub id."""
        return self.repository.name

    @property
    def commit(self) -> str | None:
        """The commit that the files come from, if they come from the Hub."""
        return self.repository.commit

    @property
    def files(self) -> dict[Path, FileIdentity | None]:
        """The files that make up the checkpoint, and what they were when they were read."""
        tensors = {info.file: info.identity for info in self.tensors.values()}
        companions = {it.file: it.identity for it in self.companions.values()}
        return {self.config_file: self.config_identity, **tensors, **companions}


@dataclass(frozen=True, slots=True)
class Companion:
    """A file beside the weights that belongs to a draft."""

    file: Path
    identity: FileIdentity | None = None
    """What it was when it was found; ``None`` if it was not fetched from the Hub."""


def find_companions(repository: Repository, names: Collection[str]) -> dict[str, Companion]:
    """Those of the files of these names that are there.

    Raises:
        HubError: if a file cannot be fetched from the Hub.

    """
    found = {name: repository.file(name) for name in names if repository.holds(name)}
    return {name: Companion(path, FileIdentity.at(path)) for name, path in found.items() if path}


def read_checkpoint(repository: Repository) -> Checkpoint:
    """Read a checkpoint's config.json and the headers of its weight files.

    Raises:
        CheckpointError: if either is missing or damaged.
        HubError: if a file cannot be fetched from the Hub.

    """
    _weights_of(repository)
    config, config_file, identity = _read_config(repository)
    tensors = read_tensors(repository)
    return Checkpoint(repository, config, config_file, tensors, identity)


def read_config(repository: Repository) -> tuple[dict[str, Any], Path]:
    """Read a repository's config.json; also return its local path.

    Raises:
        CheckpointError: if it is missing or not a JSON object.
        HubError: if it cannot be fetched from the Hub.

    """
    config, path, _ = _read_config(repository)
    return config, path


def _read_config(repository: Repository) -> tuple[dict[str, Any], Path, FileIdentity]:
    path = repository.file("config.json")
    if path is None:
        where = " beside it" if repository.weights else ""
        advice = _say_what_is_there(repository)
        raise CheckpointError(
            f"{repository.name} has no config.json{where}, so it is not a checkpoint; "
            f"{advice or 'give the directory that holds config.json and the weights'}."
        )
    identity = FileIdentity.at(path)
    return read_json(path, identity=identity), path, identity


def read_tensors(
    repository: Repository, only: Collection[str] | None = None
) -> dict[str, TensorInfo]:
    """Read the table of tensors of a repository.

    Args:
        repository: where the files are.
        only: the names of the tensors that are needed; all if not given. Shards that hold none of
            them are neither read nor downloaded. The result may hold more tensors.

    Raises:
        CheckpointError: if there are no weights, or they are damaged.
        HubError: if a file cannot be fetched from the Hub.

    """
    weights = _weights_of(repository)
    for filename, container in weights.items():
        path = (
            repository.file(filename)
            if filename.endswith(INDEX)
            else _fetch(repository, container, filename, only)
        )
        if path is None:
            continue
        chosen = filename
        if index := _index_beside(repository, filename):
            chosen, path = index.name, index
        if only is None:
            _say_what_is_passed_over(repository, chosen, weights)
        if chosen.endswith(INDEX):
            return _read_shards(repository, container, path, only)
        return _read_file(container, path)
    if repository.weights is None and (path := _find_deepspeed_weights(repository)):
        return _read_file(CONTAINERS[-1], path)
    advice = _say_what_is_there(repository) or _name_other_weights(repository)
    raise NoWeightsError(
        f"{repository.name} has no weights: none of {', '.join(weights)} is there; "
        f"{advice or 'a file of another name can be given itself'}."
    )


def read_names(repository: Repository) -> set[str]:
    """The names of a repository's tensors, from its index if it has one; no shard is read.

    Raises:
        CheckpointError: if there are no weights, or what names them is damaged.
        HubError: if a file cannot be fetched from the Hub.

    """
    for filename in _weights_of(repository):
        if not repository.holds(filename):
            continue
        if filename.endswith(INDEX):
            index = repository.file(filename)
        else:
            index = _index_beside(repository, filename)
        if index is not None:
            return set(_read_weight_map(index))
        break
    return set(read_tensors(repository))


def _name_other_weights(repository: Repository) -> str | None:
    """Name files of weights that are not called as they usually are; ``None`` if there are none."""
    suffixes = tuple(suffix for container in CONTAINERS for suffix in container.suffixes)
    others = sorted(it for it in repository.names() if it.endswith(suffixes) and "/" not in it)
    if not others or not isinstance(repository, LocalDirectory):
        return None
    given = repository.path / others[0]
    return f"it has {', '.join(map(printable, others[:4]))}: give {printable(str(given))} itself"


def _say_what_is_there(repository: Repository) -> str | None:
    """What a repository is that lacks a config or weights; ``None`` if that is not known."""
    local = isinstance(repository, LocalDirectory)
    name = str(repository.path) if isinstance(repository, LocalDirectory) else repository.name
    return repository.unseen() or describe_folder(name, repository.names(), local=local)


def _find_deepspeed_weights(repository: Repository) -> Path | None:
    latest = repository.file("latest")
    newest = None
    if latest is not None:
        with latest.open(errors="replace") as file:
            newest = file.read(MAX_FILENAME).strip()
    found = deepspeed_weights(repository.names(), newest)
    if found is None:
        return None
    logger.info(f"{repository.name} is a DeepSpeed checkpoint: {found} is read")
    return repository.file(found)


def _read_file(container: Container, path: Path) -> dict[str, TensorInfo]:
    """Read a file of weights, and refuse one whose weights are elsewhere or of another kind."""
    tensors = container.read(path)
    for name, info in tensors.items():
        if info.shape == (0,) and name.endswith("weight"):
            raise CheckpointError(
                f"{path} has only a placeholder of shape (0) for {name}, as DeepSpeed's ZeRO stage "
                "3 leaves it: make weights with the zero_to_fp32.py that is saved with the "
                "checkpoint, or save them with stage3_gather_16bit_weights_on_model_save."
            )
        if ELSEWHERE.search(name):
            what, todo = next(it for part, it in PARTS.items() if part in name)
            raise CheckpointError(f"{path} holds {what} ({name}): {todo}.")
    return tensors


def _weights_of(repository: Repository) -> dict[str, Container]:
    """The weight files to look for: ``WEIGHTS``, or the one that the user named."""
    named = repository.weights
    if named is None:
        return WEIGHTS
    for container in CONTAINERS:
        if named.removesuffix(INDEX).endswith(container.suffixes):
            return {named: container}
    suffixes = ", ".join(suffix for container in CONTAINERS for suffix in container.suffixes)
    raise CheckpointError(
        f"{repository.name} is a file; give the directory that holds config.json, or in it a file "
        f"of weights (its name ends in one of {suffixes}) or the index of several (in {INDEX})."
    )


def _index_beside(repository: Repository, filename: str) -> Path | None:
    """The index that names a file as one of several though it is called like the only one, if any.

    So llm-compressor (0.14.0) leaves a model whose MTP it adds in a second file.
    """
    index = filename + INDEX
    if repository.weights is not None or index not in WEIGHTS or not repository.holds(index):
        return None
    path = repository.file(index)
    return path if path is not None and filename in _read_weight_map(path).values() else None


def _fetch(
    repository: Repository, container: Container, filename: str, only: Collection[str] | None
) -> Path | None:
    if only is not None and container.in_parts:
        return repository.part(filename, only)
    return repository.file(filename)


def _say_what_is_passed_over(
    repository: Repository, chosen: str, weights: dict[str, Container]
) -> None:
    names = list(weights)
    others = [name for name in names[names.index(chosen) + 1 :] if repository.holds(name)]
    if others:
        logger.info(f"{repository.name} has {chosen} and {' and '.join(others)}: {chosen} is read")


def _read_shards(
    repository: Repository, container: Container, index: Path, only: Collection[str] | None
) -> dict[str, TensorInfo]:
    shards = {
        name: _shard_name(index, name, shard)
        for name, shard in _read_weight_map(index).items()
        if only is None or name in only
    }
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(shards.values())):
        path = _fetch(repository, container, shard, only)
        if path is None:
            some = any(it in _read_weight_map(index).values() for it in repository.names())
            raise (CheckpointError if some else NotFetchedError)(
                f"{repository.name} has no {shard}, which {index.name} names; "
                f"{repository.unseen() or 'fetch the missing file'}."
            )
        _check_stays(path, index)
        for name, info in _read_file(container, path).items():
            if shards.get(name) == shard:
                tensors[name] = info
            elif only is None:
                where = f"puts it into {shards[name]}" if name in shards else "does not name it"
                raise CheckpointError(f"{path} holds the tensor {name}, but {index.name} {where}.")
    for name, shard in shards.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index.name} says that {shard} holds the tensor {name}, but it does not."
            )
    return tensors


def _read_weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files.")
    return weight_map


def _shard_name(index: Path, name: str, shard: object) -> str:
    """Check that a shard is a file beside the index, which must not lead out of its directory."""
    check_name(name, index)
    if (
        not isinstance(shard, str)
        or shard in {"", ".."}
        or PurePosixPath(shard).name != shard
        or not shard.isprintable()
        or len(shard) > MAX_FILENAME
    ):
        raise CheckpointError(
            f"{index} puts the tensor {name} into {printable(str(shard))!r}, which is not a file "
            "name in its directory; it is not followed."
        )
    return shard


def _check_stays(shard: Path, index: Path) -> None:
    """Check that a shard that is a symlink does not lead out of its directory either.

    Symlinks into a Hub cache, to the folder ``blobs`` of a repository, are allowed: files in the
    cache are such symlinks, and older clients put them into other directories, too, on request.
    """
    target = shard.resolve()
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if shard.is_symlink() and not in_cache and target.parent != index.parent.resolve():
        raise CheckpointError(
            f"{shard}, which {index.name} names, is a link that leads out of its directory, to "
            f"{target}; it is not followed: put the file itself there."
        )
