"""``mask_embedding.pt``: a mask token's embedding that is not in the vocabulary's."""

from pathlib import Path

from speculators.checkpoint.files.torch_file import read_torch_entries
from speculators.checkpoint.tensor import FLOATS, TensorInfo, describe_shape
from speculators.errors import ConversionError

__all__ = ["check_mask_embedding"]


def check_mask_embedding(file: Path, token: int, hidden: int) -> None:
    """Check that a file holds the embedding of a mask token.

    Args:
        file: what ``torch.save`` wrote: the vector, or a dict that has it as ``embedding`` and the
            token as ``mask_token_id``.
        token: the mask token.
        hidden: the size of an embedding.

    Raises:
        CheckpointError: if it cannot be read, or is not safe to read.
        ConversionError: if it holds something else.

    """
    entries = read_torch_entries(file)
    embedding = entries.get("embedding", entries.get(""))
    if not isinstance(embedding, TensorInfo) or embedding.dtype not in FLOATS:
        raise ConversionError(
            f"{file} holds no embedding, neither by itself nor under 'embedding', as vLLM and "
            "SGLang read it; give the file as it was published, or remove it."
        )
    if entries.get("per_position"):
        raise ConversionError(
            f"{file} has an embedding for each position, which no engine reads; serve the draft "
            "with what trained it."
        )
    if embedding.elements != hidden:
        raise ConversionError(
            f"{file}: the embedding has the shape {describe_shape(embedding.shape)}, but the "
            f"draft's hidden size is {hidden}; give the file that belongs to it."
        )
    if entries.get("mask_token_id", token) != token:
        raise ConversionError(
            f"{file} is that of the mask token {entries['mask_token_id']}, but config.json says "
            f"{token}; give the file that belongs to it."
        )
