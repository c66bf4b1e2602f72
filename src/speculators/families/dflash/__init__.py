"""DFlash, DFlash 2 and DSpark: drafts that propose a block of tokens in one pass."""
