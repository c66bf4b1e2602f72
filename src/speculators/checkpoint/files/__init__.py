"""Formats of checkpoint files, read without running or trusting anything in them."""
