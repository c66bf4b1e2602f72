"""The command line: one module a command, parsing and printing only."""

from speculators.cli.app import main

__all__ = ["main"]
