"""How to serve what is exported, where an engine would otherwise stop or go wrong."""

from speculators.format.config import LayerConfig, SpeculatorConfig

__all__ = ["give_each_its_compile_cache", "limit_context"]


def give_each_its_compile_cache(_config: SpeculatorConfig) -> str:
    """What vLLM 0.26 to 0.29 get wrong: the key of their compile cache lacks an EAGLE-1 draft."""
    return (
        "vLLM 0.26 to 0.29 without the speculators plugin may run this draft with the compiled "
        "graph of another one: give every draft a VLLM_CACHE_ROOT of its own there"
    )


def limit_context(config: SpeculatorConfig) -> str:
    """What SGLang wants to know if it serves longer contexts than a draft's config allows.

    As SGLang 0.5.23 derives the length (``srt/configs/model_config.py``).
    """
    tokens = _context_length(config.transformer_layer_config)
    return (
        f"SGLang does not start if it serves contexts longer than this draft's {tokens} tokens: "
        f"give it --context-length {tokens}, or set SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 to "
        "draft beyond them"
    )


def _context_length(layer: LayerConfig) -> int:
    scaling = layer.rope_scaling or {}
    is_scaled = layer.rope_type not in {"default", "llama3"}
    stretched = is_scaled and "original_max_position_embeddings" not in scaling
    factor = scaling.get("factor", 1) if stretched else 1
    return int(layer.max_position_embeddings * factor)
