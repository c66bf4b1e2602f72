"""DFlash, DFlash 2 and DSpark: drafts that propose a block of tokens in one pass."""

from speculators.families.dflash.config import DFlash2Config, DFlashConfig, DSparkConfig
from speculators.families.dflash.family import DFLASH, DFLASH2, DSPARK

__all__ = ["DFLASH", "DFLASH2", "DSPARK", "DFlash2Config", "DFlashConfig", "DSparkConfig"]
