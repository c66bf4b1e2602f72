"""From a repository's files to its config and its table of tensors, without reading their data."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loguru import logger

from speculators.checkpoint.repository import Repository
from speculators.checkpoint.safetensors_file import read_safetensors_file
from speculators.checkpoint.tensor import TensorInfo
from speculators.checkpoint.torch_file import read_torch_file
from speculators.errors import CheckpointError, NoWeightsError

__all__ = ["Checkpoint", "read_checkpoint", "read_config", "read_json", "read_tensors"]


@dataclass(frozen=True, slots=True)
class Container:
    """A way of keeping tensors in files: which file shows it, and how a file of it is read."""

    filename: str
    read: Callable[[Path], dict[str, TensorInfo]]

    @property
    def index(self) -> str:
        """The file that shows that the tensors are spread over several files."""
        return f"{self.filename}.index.json"


# In the order of preference: the first one that a repository has is read.
CONTAINERS = (
    Container("model.safetensors", read_safetensors_file),
    Container("pytorch_model.bin", read_torch_file),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A config and a table of tensors, as they were found."""

    name: str
    """What the user called it: a path or a Hub id."""

    config: dict[str, Any]
    config_file: Path
    tensors: dict[str, TensorInfo]


def read_checkpoint(repository: Repository) -> Checkpoint:
    """Read a checkpoint's config.json and the headers of its weight files.

    Raises:
        CheckpointError: if either is missing or damaged.
        HubError: if a file cannot be had from the Hub.

    """
    config, config_file = read_config(repository)
    return Checkpoint(repository.name, config, config_file, read_tensors(repository))


def read_config(repository: Repository) -> tuple[dict[str, Any], Path]:
    """Read a repository's config.json; also returns its local path.

    Raises:
        CheckpointError: if it is missing or no JSON object.
        HubError: if it cannot be had from the Hub.

    """
    path = repository.file("config.json")
    if path is None:
        raise CheckpointError(
            f"{repository.name} has no config.json, so it is no checkpoint; "
            "give the directory that holds config.json and the weights."
        )
    return read_json(path), path


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: if it holds anything else.

    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again.")
    return value


def read_tensors(
    repository: Repository, only: Collection[str] | None = None
) -> dict[str, TensorInfo]:
    """Read the table of tensors of a repository.

    Args:
        repository: where the files are.
        only: the names that matter: of several weight files, those without any of them are
            left alone (and not downloaded). All, if not given.

    Raises:
        CheckpointError: if there are no weights, or they are damaged.
        HubError: if a file cannot be had from the Hub.

    """
    for container in CONTAINERS:
        if path := repository.file(container.filename):
            _say_what_is_passed_over(repository, container)
            return container.read(path)
        if index := repository.file(container.index):
            _say_what_is_passed_over(repository, container)
            return _read_shards(repository, container, index, only)
    expected = ", ".join(
        name for container in CONTAINERS for name in (container.filename, container.index)
    )
    raise NoWeightsError(f"{repository.name} has no weights: none of {expected} is there.")


def _say_what_is_passed_over(repository: Repository, chosen: Container) -> None:
    others = CONTAINERS[CONTAINERS.index(chosen) + 1 :]
    for other in others:
        if repository.holds(other.filename) or repository.holds(other.index):
            logger.info(
                f"{repository.name} has {chosen.filename} and {other.filename}: "
                f"{chosen.filename} is read"
            )


def _read_shards(
    repository: Repository, container: Container, index: Path, only: Collection[str] | None
) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files.")
    wanted = {name: _shard_name(index, name, shard) for name, shard in weight_map.items()}

    tensors: dict[str, TensorInfo] = {}
    for shard in sorted({wanted[name] for name in wanted if only is None or name in only}):
        path = repository.file(shard)
        if path is None:
            raise CheckpointError(
                f"{repository.name} has no {shard}, which {index.name} names; "
                "fetch the missing file."
            )
        for name, info in container.read(path).items():
            if wanted.get(name) != shard:
                where = f"puts it into {wanted[name]}" if name in wanted else "does not name it"
                raise CheckpointError(f"{path} holds the tensor {name}, but {index.name} {where}.")
            tensors[name] = info
    for name, shard in wanted.items():
        if name not in tensors and (only is None or name in only):
            raise CheckpointError(
                f"{index.name} says that {shard} holds the tensor {name}, but it does not."
            )
    return tensors


def _shard_name(index: Path, name: str, shard: object) -> str:
    """A file beside the index: a map from elsewhere must not lead out of its directory."""
    if not isinstance(shard, str) or len(PurePosixPath(shard).parts) != 1 or shard in {".", ".."}:
        raise CheckpointError(
            f"{index} puts the tensor {name} into {shard!r}, which is no file name in its "
            "directory; it is not followed."
        )
    return shard
