"""Whether a draft's own embedding was trained."""

import math

import torch
from loguru import logger
from torch import Tensor

from speculators.checkpoint.tensor import TensorInfo
from speculators.convert.plan import ConversionPlan
from speculators.errors import SpeculatorsError
from speculators.models.tensors import read_tensor

__all__ = ["warn_of_untrained_embedding"]

FRESH_DEVIATIONS = (0.02, 1.0)
"""The standard deviations that embeddings are initialised with: transformers', and torch's."""

NORMAL_KURTOSIS, KURTOSIS_TOLERANCE = 3.0, 0.15
"""Of a normal distribution; training gives an embedding heavier tails."""

LIKENESS = 0.5
"""Correlation from which on an embedding is the verifier's, or was trained from it."""

SAMPLED_ROWS = 1024


def warn_of_untrained_embedding(plan: ConversionPlan) -> None:
    """Warn of an embedding that is as an initialisation leaves it, and not the verifier's."""
    planned = plan.tensors.get("embed_tokens.weight")
    if planned is None or len(planned.sources) != 1:
        return
    sample = _sample(planned.sources[0])
    deviation, mean = sample.std().item(), sample.mean().item()
    scaled = (sample - mean).div_(max(deviation, 1e-30))
    kurtosis = scaled.square_().square_().mean().item()
    layer = plan.config.transformer_layer_config
    fresh = any(
        math.isclose(deviation, usual, rel_tol=0.03) and abs(mean) < 0.03 * usual
        for usual in {*FRESH_DEVIATIONS, layer.initializer_range}
    )
    if not fresh or abs(kurtosis - NORMAL_KURTOSIS) > KURTOSIS_TOLERANCE:
        return
    try:
        verifiers = _sample(plan.verifier.embedding())
    except (SpeculatorsError, KeyError):
        others = "the verifier's is not available to compare"
    else:
        if _correlation(sample, verifiers) > LIKENESS:
            return
        others = "it is not like the verifier's"
    logger.warning(
        f"{planned.label} looks untrained: its values are normally distributed with a deviation of "
        f"{deviation:.2g}, as initialisation leaves them, and {others}; check that the draft was "
        "saved whole, or remove it to draft with the verifier's embedding"
    )


def _correlation(one: Tensor, other: Tensor) -> float:
    """The correlation of two matrices' values; 0 if their shapes differ."""
    if one.shape != other.shape:
        return 0.0
    return torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].item()


def _sample(info: TensorInfo) -> Tensor:
    """Rows from the middle of a matrix, in float32."""
    rows = min(info.shape[0], SAMPLED_ROWS)
    start = (info.shape[0] - rows) // 2
    return read_tensor(info.slice(start, start + rows)).float()
