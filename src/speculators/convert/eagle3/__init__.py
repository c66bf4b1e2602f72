"""Converting EAGLE-3, EAGLE-3.1 and P-EAGLE checkpoints."""

from speculators.convert.eagle3.eagle3_converter import Eagle3Converter

__all__ = ["Eagle3Converter"]
