"""Reading the texts and states of a recording."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from speculators.errors import EvaluationError
from speculators.evaluate.recording.manifest import Recording, layer_file, text_file
from speculators.evaluate.recording.texts import Text

__all__ = ["read_text", "read_tokens"]


def read_tokens(recording: Recording, index: int) -> Tensor:
    """The tokens of a text, (prompt + new + beyond), by the number of its prompt from 0.

    Raises:
        EvaluationError: as for ``read_text``.

    """
    prompt = recording.manifest.prompts[index]
    beyond = recording.manifest.longest_draft - 1
    return _read(
        recording.directory / text_file(index),
        "tokens",
        torch.int64,
        (prompt.prompt_tokens + prompt.new_tokens + beyond,),
    )


def read_text(recording: Recording, index: int, layers: Sequence[int]) -> Text:
    """A text with the states that a draft reads, by the number of its prompt from 0.

    Args:
        recording: the recording.
        index: the number.
        layers: whose inputs to read, concatenated; the last hidden states if empty.

    Raises:
        EvaluationError: if a file cannot be read, or does not hold what the manifest says.

    """
    manifest, directory = recording.manifest, recording.directory
    prompt = manifest.prompts[index]
    dtype = getattr(torch, manifest.dtype)
    length = prompt.prompt_tokens + prompt.new_tokens - 1
    files = [directory / layer_file(index, layer) for layer in layers]
    states = [
        _read(file, "states", dtype, (length, None))
        for file in files or [directory / text_file(index)]
    ]
    sampled = manifest.settings.temperature > 0
    drawn = (prompt.new_tokens + manifest.longest_draft - 1,)
    return Text(
        prompt_tokens=prompt.prompt_tokens,
        new_tokens=prompt.new_tokens,
        tokens=read_tokens(recording, index),
        states=torch.cat(states, -1),
        probabilities=_read(directory / text_file(index), "probabilities", torch.float32, drawn)
        if sampled
        else None,
    )


def _read(file: Path, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """Read a tensor, and check that it has a shape, in which ``None`` stands for any size."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise EvaluationError(f"{file} cannot be read ({error}); record again.") from error
    fits = len(shape) == tensor.ndim and all(
        size in {None, found} for size, found in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise EvaluationError(
            f"{file} does not hold what the manifest says: {name} is of another shape or type; "
            "record again."
        )
    return tensor
