"""The models that vLLM gets from here, by the names under which it looks them up."""

__all__ = ["ARCHITECTURE", "MODELS"]

ARCHITECTURE = "EagleSpeculatorDraft"
"""What vLLM calls the draft's model; no checkpoint names it."""

MODELS = {
    ARCHITECTURE: "speculators.integrations.vllm.draft:EagleDraft",
    "EagleLlamaForCausalLM": "speculators.integrations.vllm.plain:PlainEagle",
}
"""vLLM's model names → classes, which vLLM imports later: no device may be initialised yet."""
