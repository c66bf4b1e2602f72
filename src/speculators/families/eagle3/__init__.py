"""EAGLE-3, EAGLE-3.1 and P-EAGLE."""

from speculators.families.eagle3.config import Eagle3Config
from speculators.families.eagle3.family import EAGLE3

__all__ = ["EAGLE3", "Eagle3Config"]
