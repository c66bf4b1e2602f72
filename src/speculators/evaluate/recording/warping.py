"""What shapes distributions when tokens are sampled with the settings of an evaluation."""

from transformers import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from speculators.decode.sampling import Warp, warp_of
from speculators.evaluate.report import Settings

__all__ = ["recorded_warp"]


def recorded_warp(settings: Settings) -> Warp:
    """The warp that ``generate`` makes of these settings, in its order."""
    warpers = LogitsProcessorList()
    if settings.temperature not in {0.0, 1.0}:
        warpers.append(TemperatureLogitsWarper(settings.temperature))
    if settings.temperature and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return warp_of(warpers)
