"""How the numbers of two computations are compared, and on which inputs."""

from loguru import logger
from torch import Tensor

from speculators.errors import ValidationError

__all__ = ["ROWS", "SEED", "TOLERANCE", "check_same"]

TOLERANCE = 1e-4
"""Largest difference allowed from the reference, over its largest value (at least 1)."""

SEED, ROWS = 20240126, 2
"""Of the random inputs: how they are drawn, and how many sequences there are."""


def check_same(problem: str, found: Tensor, expected: Tensor) -> None:
    """Check that two computations agree within ``TOLERANCE``.

    Raises:
        ValidationError: if they do not; ``problem`` says what that means.

    """
    difference = (found.float() - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE * scale:
        raise ValidationError(
            f"{problem} (largest difference {difference:.2g} at values up to {scale:.2g})."
        )
    logger.debug(f"Largest difference {difference:.2g} at values up to {scale:.2g}")
