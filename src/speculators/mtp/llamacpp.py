"""What llama.cpp's converter takes to make a GGUF of an MTP alone: ``convert_hf_to_gguf.py --mtp``.

Of a verifier's directory it keeps the MTP, the embedding, the final norm and the head, and reads
the tokenizer. A directory with these alone is enough, and far smaller. What it knows was read off
llama.cpp's build 11434 (``conversion/*.py``, classes with ``supports_mtp_export``; ``src/models``
for what runs), and it was run on Qwen3-Next, Qwen3.5 and GLM-4-MoE.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from speculators.errors import ConversionError
from speculators.mtp.find import Mtp
from speculators.mtp.types import PREFIX, language_config

__all__ = ["TOKENIZER_FILES", "taken_along"]

ARCHITECTURES = frozenset(
    {
        "BailingMoeV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "Glm4vMoeForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "HYV3ForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiMoV2ForCausalLM",
        "NemotronHForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpForConditionalGeneration",
        "Step3p5ForCausalLM",
        "Step3p7ForConditionalGeneration",
    }
)
"""What config.json has to say first under ``architectures``. Of others, such as DeepSeek-V3, the
converter takes no MTP alone, or leaves it out of the whole model, too."""

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
    said = config.get("architectures")
    architecture = said[0] if isinstance(said, list) and said else None
    if architecture is None:
        raise ConversionError(
            f"config.json of {name} has no list of architectures, by which llama.cpp's converter "
            "tells models apart; give the verifier as it was published."
        )
    if architecture not in ARCHITECTURES:
        raise ConversionError(
            f"{name} is of the architecture {architecture}, of which llama.cpp's converter takes "
            "no MTP alone; docs/mtp.md has a list of those that it knows."
        )
    if mtp.type.name in {"qwen", "qwen3_next"}:
        if mtp.layers > 1:
            raise ConversionError(
                f"{name} has an MTP of {mtp.layers} layers, and llama.cpp runs those of Qwen with "
                "one only; serve it with vLLM."
            )
        if own := [it for it in mtp.slots if it.startswith("mtp.embed_tokens.")]:
            raise ConversionError(
                f"{name} has {own[0]}, an embedding of the MTP's own, which llama.cpp's converter "
                "does not know; serve it with vLLM."
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
