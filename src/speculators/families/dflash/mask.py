"""The token that stands for tokens that are not drafted yet, and an embedding of its own."""

from pathlib import Path
from typing import Any

from speculators.checkpoint.files.torch_file import read_torch_entries
from speculators.checkpoint.tensor import FLOATS, TensorInfo, describe_shape
from speculators.errors import ConversionError
from speculators.families.dflash.config import MASK_FILE
from speculators.families.dflash.native import Kind, Said
from speculators.families.research.options import MASK_TOKEN_ID, ask

__all__ = ["MASK_TOKEN_KEYS", "mask_token"]

MASK_TOKEN_KEYS = (
    "mask_token_id",
    "dspark_noise_token_id",
    "pard_token",
    "ptd_token_id",
)
"""Keys of the token, as layouts and engines spell them; the first one is written."""


def mask_token(
    said: Said, vocabulary: int, hidden: int, kind: Kind, notes: list[str]
) -> dict[str, Any]:
    """The mask token, and whether it has an embedding of its own in a file."""
    answer = said.source.options.get(MASK_TOKEN_ID.name)
    token = said.whole_number(*MASK_TOKEN_KEYS, at_least=0)
    if None not in (token, answer) and token != answer:
        raise ConversionError(
            f"{MASK_TOKEN_ID.flag} {answer} contradicts {said.where}, which says {token}."
        )
    token = token if token is not None else answer
    if token is None:
        notes.append(
            ask(
                said.source,
                MASK_TOKEN_ID,
                "its config.json does not say which token stands for those that are not drafted "
                "yet.",
            )
        )
        token = 0  # not written: without a verifier, nothing is
    if token >= vocabulary:
        raise ConversionError(
            f"{said.where}: the mask token {token} is not a token of the vocabulary of "
            f"{vocabulary}."
        )
    companion = said.source.checkpoint.companions.get(MASK_FILE)
    if companion is None:
        return {"mask_token_id": token}
    if kind == "dspark":
        raise ConversionError(
            f"{said.source.checkpoint.name} has {MASK_FILE}, which no engine reads for a DSpark "
            "draft; remove it if the training did not use it."
        )
    if said.source.verifier is not None:  # otherwise no data is read
        _check_embedding(companion.file, token, hidden)
    return {"mask_token_id": token, "mask_embedding": True}


def _check_embedding(file: Path, token: int, hidden: int) -> None:
    """Check that a file holds the embedding of a mask token, by itself or in a dict."""
    entries = read_torch_entries(file)
    embedding = entries.get("embedding", entries.get(""))
    if not isinstance(embedding, TensorInfo) or embedding.dtype not in FLOATS:
        raise ConversionError(
            f"{file} does not hold an embedding, by itself or under 'embedding', where vLLM and "
            "SGLang look for it; give the file as it was published, or remove it."
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
            f"{file} belongs to the mask token {entries['mask_token_id']}, but config.json says "
            f"{token}; give the file that belongs to it."
        )
