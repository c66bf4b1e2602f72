"""All commands of the command line."""

from collections.abc import Iterator
from typing import Any

import typer.main

from speculators.cli.app import app

__all__ = ["COMMANDS"]


def commands(group: Any, *names: str) -> Iterator[tuple[str, ...]]:
    """The words of every command; groups are not commands."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name)


COMMANDS = list(commands(typer.main.get_command(app)))
