"""Settings that commands have where they are not given; light, since the help lists them."""

__all__ = ["BATCH", "LONGEST_DRAFT", "MAX_NEW_TOKENS"]

MAX_NEW_TOKENS = 256
"""The longest output, in tokens."""

LONGEST_DRAFT = 16
"""The depth of the deepest proposals that can be scored on a recording."""

BATCH = 16
"""The number of prompts that are decoded at the same time for a recording."""
