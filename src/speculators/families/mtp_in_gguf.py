"""Which MTPs llama.cpp's converter makes a GGUF of alone: ``convert_hf_to_gguf.py --mtp``.

Read off llama.cpp's build 11434 (``conversion/*.py``, classes with ``supports_mtp_export``;
``src/models`` for what runs); it was run on Qwen3-Next, Qwen3.5 and GLM-4-MoE. ``inspect`` and
``mtp cut --to llamacpp`` both ask here.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["why_not_in_gguf"]

QWEN = {
    r"mtp\.layers\.[1-9]\d*\..*": "has an MTP of several layers, and llama.cpp runs only one",
    r"mtp\.embed_tokens\..*": (
        "has an embedding of the MTP's own, which llama.cpp's converter does not know"
    ),
}

ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "BailingMoeV3ForCausalLM": {},
    "DeepseekV32ForCausalLM": {},
    "DeepseekV4ForCausalLM": {},
    "Glm4MoeForCausalLM": {},
    "Glm4MoeLiteForCausalLM": {},
    "Glm4vMoeForConditionalGeneration": {},
    "GlmMoeDsaForCausalLM": {},
    "HYV3ForCausalLM": {},
    "MiMoV2FlashForCausalLM": {},
    "MiMoV2ForCausalLM": {},
    "NemotronHForCausalLM": {},
    "Qwen3NextForCausalLM": QWEN,
    "Qwen3_5ForCausalLM": QWEN,
    "Qwen3_5ForConditionalGeneration": QWEN,
    "Qwen3_5MoeForCausalLM": QWEN,
    "Qwen3_5MoeForConditionalGeneration": QWEN,
    "Qwen4ExpForCausalLM": {},
    "Qwen4ExpForConditionalGeneration": {},
    "Step3p5ForCausalLM": {},
    "Step3p7ForConditionalGeneration": {},
}
"""What config.json has to say first under ``architectures`` → pattern of tensor names → what they
show that llama.cpp does not compute. Of other architectures, such as DeepSeek-V3, the converter
takes no MTP alone, or leaves it out of the whole model, too."""


def why_not_in_gguf(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Why llama.cpp does not take an MTP, as a clause that follows "it"; ``None`` if it does.

    Args:
        config: the config.json of the MTP or of its verifier.
        names: of the tensors.

    """
    said = config.get("architectures")
    architecture = said[0] if isinstance(said, list) and said else None
    if architecture is None:
        return (
            "has no list of architectures in its config.json, by which llama.cpp's converter tells "
            "models apart"
        )
    if architecture not in ARCHITECTURES:
        return (
            f"has the architecture {architecture}, whose MTP llama.cpp's converter does not take "
            "alone"
        )
    return next(
        (
            what
            for pattern, what in ARCHITECTURES[architecture].items()
            if any(re.fullmatch(pattern, name) for name in names)
        ),
        None,
    )
