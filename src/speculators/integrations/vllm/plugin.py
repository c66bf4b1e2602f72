"""The entry point that vLLM calls in each of its processes before it reads any model."""

import logging
from multiprocessing import parent_process
from pathlib import Path

from speculators.integrations.vllm.compile_cache import add_draft_to_key
from speculators.integrations.vllm.config import update_eagle
from speculators.integrations.vllm.cpu import mend_cpu_backend
from speculators.integrations.vllm.models import MODELS
from speculators.integrations.vllm.releases import INSTALL, is_tested, missing_parts

__all__ = ["register"]

# A child of vLLM's own logger, so that its level, format and handlers apply.
logger = logging.getLogger("vllm.plugins.speculators")


def register() -> None:
    """Register the speculators type "eagle" with vLLM in this process; never raises.

    vLLM may call it several times in one process. In a release without the parts that the plugin
    needs, it logs a warning and changes nothing.
    """
    try:
        import vllm
    except ImportError:
        return
    version = vllm.__version__
    if missing := missing_parts(Path(vllm.__file__).parent):
        _step_aside(version, "; ".join(missing))
        return
    try:
        from vllm.config import SpeculativeConfig
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES
    except ImportError as error:
        _step_aside(version, str(error))
        return
    if SUPPORTED_SPECULATORS_TYPES.get("eagle") is update_eagle:
        return
    if not is_tested(version):
        _warn(
            f"The speculators plugin was not tested with vLLM {version}. It goes on, since the "
            "parts of vLLM that it uses look the same. If converted drafts do not work: "
            f"{INSTALL}"
        )
    SUPPORTED_SPECULATORS_TYPES["eagle"] = update_eagle
    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)
    add_draft_to_key(SpeculativeConfig)
    mend_cpu_backend()


def _step_aside(version: str, why: str) -> None:
    _warn(
        f"The speculators plugin does nothing, since vLLM {version} differs from what it needs "
        f"({why}). Converted EAGLE drafts cannot be served. {INSTALL}. Or export plain ones: "
        "speculators export DIR OUT --to vllm"
    )


def _warn(message: str) -> None:
    """Log it once: vLLM's further processes load the plugin, too."""
    if parent_process() is None:
        logger.warning(message)
