"""What llama.cpp's converter takes to make a GGUF of an MTP alone: ``convert_hf_to_gguf.py --mtp``.

Of a verifier's directory it keeps the MTP, the embedding, the final norm and the head, and reads
the tokenizer. A directory with these alone is enough, and far smaller. What it knows was read off
llama.cpp's build 11434 (``conversion/*.py``, classes with ``supports_mtp_export``; ``src/models``
for what runs). docs/mtp.md says with which models that build was run.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from speculators.errors import ConversionError
from speculators.mtp.find import Mtp
from speculators.mtp.types import PREFIX, language_config

__all__ = ["TOKENIZER_FILES", "taken_along"]

ARCHITECTURES: Mapping[str, int | None] = {
    "BailingMoeV3ForCausalLM": 1,
    "DeepseekV32ForCausalLM": 1,
    "DeepseekV4ForCausalLM": 1,
    "Glm4MoeForCausalLM": 1,
    "Glm4MoeLiteForCausalLM": 1,
    "GlmMoeDsaForCausalLM": 1,
    "HYV3ForCausalLM": None,
    "MiMoV2FlashForCausalLM": 3,
    "MiMoV2ForCausalLM": 3,
    "NemotronHForCausalLM": None,
    "Qwen3NextForCausalLM": 1,
    "Qwen3_5ForCausalLM": 1,
    "Qwen3_5ForConditionalGeneration": 1,
    "Qwen3_5MoeForCausalLM": 1,
    "Qwen3_5MoeForConditionalGeneration": 1,
    "Qwen4ExpForCausalLM": 1,
    "Qwen4ExpForConditionalGeneration": 1,
    "Step3p5ForCausalLM": None,
    "Step3p7ForConditionalGeneration": None,
}
"""What config.json has to say first under ``architectures`` → how many MTP layers llama.cpp runs;
``None`` for any number (the two of Nemotron-H's are one to it). Of others, such as DeepSeek-V3, the
converter takes no MTP alone, or leaves it out of the whole model, too. GLM-4.5V's it takes, but
llama.cpp ends in an assertion, since the MTP's RoPE does not know M-RoPE."""

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
            f"{name} is of the architecture {architecture}, of which llama.cpp runs no MTP alone; "
            "docs/mtp.md has a list of those that it knows."
        )
    if (layers := ARCHITECTURES[architecture]) not in {None, mtp.layers}:
        raise ConversionError(
            f"{name} has an MTP of {mtp.layers} layer(s), and llama.cpp runs an MTP of "
            f"{architecture} only if it has {layers}; serve it with vLLM."
        )
    own = next((it for it in mtp.slots if it.startswith("mtp.embed_tokens.")), None)
    if own is not None and mtp.type.name in {"qwen", "qwen3_next"}:
        raise ConversionError(
            f"{name} has {own}, an embedding of the MTP's own, which llama.cpp's converter does "
            "not know; serve it with vLLM."
        )
    apart = next((it for it in mtp.slots if it.endswith("self_attn.q_proj.weight")), None)
    if apart is not None and mtp.type.name == "mimo_v2":
        raise ConversionError(
            f"{name} has {apart}, and llama.cpp runs an MTP of MiMo-V2 only if its queries, keys "
            "and values are in one matrix, self_attn.qkv_proj.weight; serve it with vLLM."
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
