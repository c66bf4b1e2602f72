"""Checkpoint files, without torch: finding them, reading their tensor tables, writing them."""
