"""A directory in the speculators format, checked without reading its tensors' data."""

import os
from dataclasses import dataclass
from pathlib import Path

from speculators.checkpoint.reader import read_config, read_tensors
from speculators.checkpoint.repository import open_repository
from speculators.checkpoint.tensor import describe_shape
from speculators.errors import FormatError
from speculators.format.config import EagleConfig, parse_config
from speculators.format.layouts import current_name
from speculators.format.tensors import features_of, required_tensors
from speculators.models.tensors import TORCH_DTYPES

__all__ = ["Converted", "open_converted"]


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted draft on this machine.

    Attributes:
        directory: where config.json and the weights lie.
        config: the checked config.
        own_embedding: whether the draft has an embedding of its own.

    """

    directory: Path
    config: EagleConfig
    own_embedding: bool


def open_converted(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Converted:
    """Find a converted draft, and check its tensors' names and shapes against its config.

    Args:
        source: a directory or a Hub id.
        revision: a branch, tag or commit on the Hub.
        cache_dir: where downloads are kept.

    Raises:
        FormatError: if it is not in the format, or its tensors are not those of its config.
        CheckpointError, HubError: if it cannot be read or had.

    """
    repository = open_repository(
        Path(source) if isinstance(source, os.PathLike) else source,
        revision=revision,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    raw, config_file = read_config(repository)
    config = parse_config(raw, repository.name)
    tensors = {current_name(name): info for name, info in read_tensors(repository).items()}
    own_embedding = "embedding" in features_of(tensors)
    required = required_tensors(config.features | ({"embedding"} if own_embedding else set()))

    missing = sorted(required.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - required.keys())
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise FormatError(f"{repository.name} {problem}, by its config.json; convert it again.")
    sizes = config.transformer_layer_config.dimensions()
    for name, spec in required.items():
        info = tensors[name]
        if info.shape != spec.shape(sizes):
            raise FormatError(
                f"{repository.name}: {info.name} has the shape {describe_shape(info.shape)}, "
                f"by config.json it should have {describe_shape(spec.shape(sizes))}; "
                "convert it again."
            )
        if info.dtype not in TORCH_DTYPES:
            raise FormatError(
                f"{repository.name}: {info.name} has the type {info.dtype}; "
                f"one of {', '.join(TORCH_DTYPES)} is expected."
            )
    return Converted(config_file.parent, config, own_embedding)
