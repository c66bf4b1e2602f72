"""Converting EAGLE-1, EAGLE-2 and HASS checkpoints."""

from speculators.convert.eagle.eagle_converter import LAYERNORM_MAPPINGS, EagleConverter

__all__ = ["LAYERNORM_MAPPINGS", "EagleConverter"]
