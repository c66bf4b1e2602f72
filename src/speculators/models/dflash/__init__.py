"""DFlash, DFlash 2 and DSpark drafts as transformers models."""

from speculators.models.dflash.backbone import DFlashSpeculator, DFlashSpeculatorConfig
from speculators.models.dflash.dflash2 import DFlash2Speculator, DFlash2SpeculatorConfig
from speculators.models.dflash.dspark import DSparkSpeculator, DSparkSpeculatorConfig

__all__ = [
    "DFlash2Speculator",
    "DFlash2SpeculatorConfig",
    "DFlashSpeculator",
    "DFlashSpeculatorConfig",
    "DSparkSpeculator",
    "DSparkSpeculatorConfig",
]
