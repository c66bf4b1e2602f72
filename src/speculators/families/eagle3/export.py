"""What an EAGLE-3 draft can be exported to, and the config.json that each reader takes."""

from typing import Any

from speculators.families.eagle3.config import Eagle3Config
from speculators.families.family import Target

__all__ = ["TARGETS", "export_config"]

TARGETS: dict[str, Target] = {}


def export_config(config: Eagle3Config, target: Target) -> dict[str, Any]:
    """The draft's config as the target's reader takes it."""
    raise NotImplementedError(config, target)
