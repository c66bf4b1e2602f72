"""The names of tables that follow from RoPE, which checkpoints store beside their weights."""

import re

__all__ = ["is_rope_table"]

ROPE_TABLE = re.compile(
    r"(.*\.)?("
    r"(rotary|rope|rotary_emb|rotary_embedding|rotary_pos_emb|rope_emb)\.[^.]+"
    r"|(original_)?inv_freqs?|freqs_(cis|cos|sin)|rope_(cache|freqs)"
    r"|(cos|sin)_(cached?|table)|cos_sin_cached?"
    r")"
)
"""RoPE's frequencies, or the cosines and sines of its angles, in the names of several models."""


def is_rope_table(name: str) -> bool:
    """Whether a tensor of this name is a table of RoPE."""
    return ROPE_TABLE.fullmatch(name) is not None
