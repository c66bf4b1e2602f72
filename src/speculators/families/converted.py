"""A directory in the speculators format, checked without reading tensor data."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from speculators.checkpoint.reader import Checkpoint, read_config, read_tensors
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.tensor import describe_shape
from speculators.errors import FormatError
from speculators.format.config import EagleConfig, parse_config
from speculators.format.layouts import current_name
from speculators.format.tensors import DTYPES, features_of, required_tensors

__all__ = ["Converted", "check_converted", "open_converted"]


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted draft on this machine.

    Attributes:
        directory: the folder of config.json and the weights.
        config: the checked config.
        own_embedding: whether the draft has its own embedding.
        commit: the commit on the Hub that it comes from; ``None`` for a directory.

    """

    directory: Path
    config: EagleConfig
    own_embedding: bool
    commit: str | None = None


def open_converted(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Converted:
    """Find a converted draft, and check its tensors' names, shapes and dtypes.

    Args:
        source: a directory or a Hub id.
        revision: a branch, tag or commit on the Hub.
        cache_dir: where downloads are kept.

    Raises:
        FormatError: if it is not in the format, or its tensors are not those of its config.
        CheckpointError, HubError: if it cannot be read or downloaded.

    """
    repository = open_repository(
        Path(source) if isinstance(source, os.PathLike) else source,
        revision=revision,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    config, config_file = read_config(repository)
    parse_config(config, repository.name)  # before the weights are fetched
    tensors = read_tensors(repository)
    checked = check_converted(Checkpoint(repository.name, config, config_file, tensors))
    return replace(checked, commit=repository.commit)


def check_converted(checkpoint: Checkpoint) -> Converted:
    """Check the names, shapes and dtypes of a converted draft's tensors against its config.

    Raises:
        FormatError: if it is not in the format, or its tensors are not those of its config.

    """
    config = parse_config(checkpoint.config, checkpoint.name)
    tensors = {current_name(name): info for name, info in checkpoint.tensors.items()}
    own_embedding = "embedding" in features_of(tensors)
    required = required_tensors(config.features | ({"embedding"} if own_embedding else set()))

    missing = sorted(required.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - required.keys())
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise FormatError(f"{checkpoint.name} {problem}, by its config.json; convert it again.")
    sizes = config.transformer_layer_config.dimensions()
    for name, spec in required.items():
        info = tensors[name]
        if info.shape != spec.shape(sizes):
            raise FormatError(
                f"{checkpoint.name}: {info.name} has the shape {describe_shape(info.shape)}, "
                f"by config.json it should have {describe_shape(spec.shape(sizes))}; "
                "convert it again."
            )
        if info.dtype not in DTYPES:
            raise FormatError(
                f"{checkpoint.name}: {info.name} has the type {info.dtype}; "
                f"one of {', '.join(DTYPES)} is expected."
            )
    return Converted(checkpoint.config_file.parent, config, own_embedding)
