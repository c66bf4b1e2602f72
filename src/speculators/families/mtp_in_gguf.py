"""Which MTPs llama.cpp's converter makes a GGUF of alone: ``convert_hf_to_gguf.py --mtp``.

Read off llama.cpp's build 11434 (``conversion/*.py``, classes with ``supports_mtp_export``;
``src/models`` for what runs); docs/mtp.md says on which models that build was run. ``inspect`` and
``mtp cut --to llamacpp`` both ask here.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["why_not_in_gguf"]

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

LAYER = re.compile(r"(?:layers|mtp)\.(\d+)\.")

REFUSED: Mapping[str, tuple[str, str]] = {
    "Qwen3": (
        r"mtp\.embed_tokens\..+",
        "has an embedding of the MTP's own, which llama.cpp's converter does not know",
    ),
    "MiMoV2": (
        r".+\.self_attn\.q_proj\.weight",
        "has queries, keys and values in matrices of their own, where llama.cpp takes one of all",
    ),
}
"""What an architecture's name begins with → a pattern of names of tensors that llama.cpp does not
compute, and what they show."""


def why_not_in_gguf(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Why llama.cpp does not take an MTP, as a clause that follows "it"; ``None`` if it does.

    Args:
        config: the config.json of the MTP or of its verifier.
        names: of the MTP's tensors; those of the verifier that have no layer's number may be there.

    """
    said = config.get("architectures")
    architecture = said[0] if isinstance(said, list) and said else None
    if architecture is None:
        return (
            "has no list of architectures in its config.json, by which llama.cpp's converter tells "
            "models apart"
        )
    if architecture not in ARCHITECTURES:
        return f"is of the architecture {architecture}, of which llama.cpp runs no MTP alone"
    layers = len({found[1] for name in names if (found := LAYER.search(name))})
    if (most := ARCHITECTURES[architecture]) not in {None, layers}:
        return (
            f"has an MTP of {layers} layer(s), and llama.cpp runs an MTP of {architecture} only if "
            f"it has {most}"
        )
    for begins, (pattern, why) in REFUSED.items():
        if architecture.startswith(begins) and any(re.fullmatch(pattern, it) for it in names):
            return why
    return None
