"""Names that earlier versions of speculators gave to the tensors of the format."""

__all__ = ["LEGACY_PREFIXES", "current_name"]

LEGACY_PREFIXES = {
    "fusion_fc.": "fc.",
    # Those versions stored the checkpoint's hidden_layernorm under this name. It was trained on the
    # incoming hidden states, before fc; a draft has no input_layernorm of its own.
    "transformer.input_layernorm.": "hidden_layernorm.",
    "transformer.": "layers.0.",
    "embedding_layernorm.": "post_embedding_layernorm.",
}
"""Prefix in files of 0.1.0 to 0.3.0 → prefix now; the first match counts."""


def current_name(name: str) -> str:
    """The current name of a tensor, whichever version of speculators wrote it."""
    for old, new in LEGACY_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
