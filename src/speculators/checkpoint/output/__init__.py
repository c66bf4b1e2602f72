"""Writing: the weights file, rounding, and a directory that appears complete or not at all."""
