"""What llama.cpp's converter takes to make a GGUF of an MTP alone: ``convert_hf_to_gguf.py --mtp``.

Of a verifier's directory it keeps the MTP, the embedding, the final norm and the head, and reads
the tokenizer. A directory with these alone is enough, and far smaller. ``families.mtp_in_gguf``
says of which models.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from speculators.errors import ConversionError
from speculators.families.mtp_in_gguf import why_not_in_gguf
from speculators.mtp.find import Mtp
from speculators.mtp.types import PREFIX, language_config

__all__ = ["TOKENIZER_FILES", "taken_along"]

BESIDE = re.compile(
    rf"{PREFIX}(?:embed_tokens|word_embeddings|norm)\.weight|lm_head\..+"
    r"|backbone\.(?:embeddings|norm_f)\.weight|embed\.weight|head\.(?:weight|scale)"
)
"""The verifier's embedding, final norm and head, with what quantization stores beside them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What the converter reads beside config.json and the weights, where it is there."""


def taken_along(
    name: str, config: Mapping[str, Any], mtp: Mtp, names: Collection[str]
) -> frozenset[str]:
    """The tensors of a verifier that belong beside its MTP.

    Args:
        name: of the checkpoint, for messages.
        config: its config.json.
        mtp: its MTP.
        names: of all its tensors.

    Raises:
        ConversionError: if llama.cpp cannot take the MTP, or tensors are missing.

    """
    if why := why_not_in_gguf(config, mtp.slots):
        raise ConversionError(
            f"{name} {why}; docs/mtp.md lists what llama.cpp takes, and vLLM serves other MTPs."
        )
    found = frozenset(it for it in names if BESIDE.fullmatch(it) and it not in mtp.slots)
    tied = bool(language_config(config).get("tie_word_embeddings"))
    for what, pattern in (
        ("embedding", r".*embed.*\.weight"),
        ("final norm", r".*norm(_f)?\.weight"),
        ("head", r"(lm_)?head\..+"),
    ):
        there = any(re.fullmatch(pattern, it) for it in found)
        if not there and not (what == "head" and tied):
            raise ConversionError(
                f"{name} lacks the verifier's {what}, which llama.cpp's draft holds beside the "
                "MTP; give the verifier."
            )
    return found
