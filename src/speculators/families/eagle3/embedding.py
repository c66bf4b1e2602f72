"""How a draft's own embedding compares with its verifier's, which some engines put in its place."""

import math
import struct

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import TensorInfo
from speculators.errors import SpeculatorsError
from speculators.families.family import Source

__all__ = ["compared_embedding"]

ROWS = 16
"""How many rows are compared, spread over the vocabulary."""

UNRELATED = 0.5
"""The cosine below which two embeddings have nothing in common; random ones are near 0."""


def compared_embedding(source: Source) -> str | None:
    """A clause on what engines do with an embedding that is not the verifier's.

    Only a verifier on this machine is looked at; ``None`` if it is the same, or not known.
    """
    own, verifier = source.tensors.get("embed_tokens.weight"), source.verifier
    if own is None or verifier is None or verifier.repository.commit is not None:
        return None
    try:
        theirs = verifier.embedding()
    except SpeculatorsError:
        return None  # the verifier's weights are not here
    if own.shape != theirs.shape or own.dtype not in FORMATS:
        return None
    ours, others = _sample(own), _sample(theirs)
    lengths = math.hypot(*ours) * math.hypot(*others)
    cosine = sum(map(float.__mul__, ours, others)) / lengths if lengths else 0.0
    if all(
        math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-3) for a, b in zip(ours, others, strict=True)
    ):
        return None
    engines = "vLLM uses it, SGLang and TensorRT-LLM put the verifier's in its place"
    if cosine < UNRELATED:
        return (
            f"its embed_tokens has nothing in common with the verifier's (cosine {cosine:.2f}), as "
            f"if it were random: {engines}"
        )
    return f"its embed_tokens is not quite the verifier's (cosine {cosine:.2f}): {engines}"


FORMATS = {"F32": "f", "F16": "e", "BF16": "H"}
"""Dtype → what ``struct`` unpacks."""


def _sample(matrix: TensorInfo) -> list[float]:
    """The values of some rows."""
    step = max(1, matrix.shape[0] // ROWS)
    values: list[float] = []
    for row in range(0, matrix.shape[0], step):
        data = b"".join(contiguous_chunks(matrix.slice(row, row + 1)))
        unpacked = [it[0] for it in struct.iter_unpack("<" + FORMATS[matrix.dtype], data)]
        if matrix.dtype == "BF16":
            words = struct.pack(f"<{len(unpacked)}I", *(half << 16 for half in unpacked))
            unpacked = [it[0] for it in struct.iter_unpack("<f", words)]
        values += unpacked
    return values
