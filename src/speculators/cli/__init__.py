"""The command line: one module per command, which only parses and prints."""

from speculators.cli.app import main

__all__ = ["main"]
