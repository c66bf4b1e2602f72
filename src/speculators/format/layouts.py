"""Names that earlier versions of speculators gave to the tensors of the format."""

__all__ = ["LEGACY_PREFIXES", "current_name"]

LEGACY_PREFIXES = {
    "fusion_fc.": "fc.",
    # That converter put the checkpoint's hidden_layernorm there. It was trained on the incoming
    # hidden states, before fc, and a draft's own input_layernorm does not exist.
    "transformer.input_layernorm.": "hidden_layernorm.",
    "transformer.": "layers.0.",
    "embedding_layernorm.": "post_embedding_layernorm.",
}
"""As 0.1.0 to 0.3.0 wrote them → as they are called now; the first match counts."""


def current_name(name: str) -> str:
    """Today's name of a tensor, whichever version of the format it was written in."""
    for old, new in LEGACY_PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
