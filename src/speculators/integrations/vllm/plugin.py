"""The entry point that vLLM calls in each of its processes before it reads any model.

An exception in a plugin aborts vLLM's start, and SUPPORTED_SPECULATORS_TYPES is not a public
interface. So the plugin acts only in releases that it was tested with; otherwise it logs a warning
and changes nothing.
"""

import logging

__all__ = ["ARCHITECTURE", "MODELS", "SUPPORTED_RELEASES", "register"]

SUPPORTED_RELEASES = ("0.32",)
"""The releases of vLLM (major.minor) that `make test-vllm` was run with."""

ARCHITECTURE = "EagleSpeculatorDraft"
"""What vLLM calls the draft's model; no checkpoint names it."""

MODELS = {
    ARCHITECTURE: "speculators.integrations.vllm.draft:EagleDraft",
    "EagleLlamaForCausalLM": "speculators.integrations.vllm.plain:PlainEagle",
}
"""vLLM's model names → classes, which vLLM imports later: no device may be initialised yet."""

# A child of vLLM's own logger, so that its level, format and handlers apply.
logger = logging.getLogger("vllm.plugins.speculators")


def register() -> None:
    """Register the speculators type "eagle" with vLLM in this process; never raises.

    vLLM may call it several times in one process.
    """
    try:
        from vllm import __version__ as version
    except ImportError:
        return
    if ".".join(version.split(".")[:2]) not in SUPPORTED_RELEASES:
        _step_aside(f"it does not know vLLM {version}, only {', '.join(SUPPORTED_RELEASES)}")
        return
    try:
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

        from speculators.integrations.vllm.config import update_eagle
    except ImportError as error:
        _step_aside(f"this vLLM {version} is not built as the release is ({error})")
        return
    SUPPORTED_SPECULATORS_TYPES["eagle"] = update_eagle
    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)


def _step_aside(why: str) -> None:
    logger.warning(
        "The speculators plugin does nothing, since %s. Converted EAGLE drafts cannot be served: "
        "install another release, or export plain ones: speculators export DIR OUT --to vllm",
        why,
    )
