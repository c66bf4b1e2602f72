"""Directories of tensors, without torch: where files come from, what is in them, writing."""
