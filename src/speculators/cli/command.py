"""Commands and groups of commands: typer's, with advice on misspelt words and narrow help."""

import re
import shutil
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from speculators.errors import did_you_mean

__all__ = ["Command", "Group"]

NARROW = 80
"""In fewer columns, typer's tables would cut words."""

NOT_A_CHOICE = re.compile(r"(?P<said>'[^']*') is not one of (?P<choices>'[^']*'(?:, '[^']*')*)\.")

HelpFormatter: Any = typer.Context.formatter_class
UsageError: Any = typer.BadParameter.__base__
# Both are click's, which some releases of typer depend on and others contain.


class NarrowHelp(HelpFormatter):  # type: ignore[misc]
    """Help without columns: every description is below what it describes, and no word is cut."""

    def __init__(self, **_: Any) -> None:
        super().__init__(width=max(shutil.get_terminal_size().columns, 20))

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write how a command is called."""
        self.write(self._filled(f"{prefix or 'Usage: '}{prog} {args}", 0) + "\n")

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        paragraphs = re.split(r"\n\s*\n", text.strip())
        self.write("\n\n".join(self._filled(it, self.current_indent) for it in paragraphs) + "\n")

    def write_dl(self, rows: Any, *_: Any, **__: Any) -> None:
        """Write terms, each with its description below."""
        for term, description in rows:
            self.write(self._filled(term, self.current_indent) + "\n")
            self.write(self._filled(description, self.current_indent + 4) + "\n")

    def _filled(self, text: str, indent: int) -> str:
        margin = " " * indent
        return textwrap.fill(
            " ".join(text.split()),
            self.width,
            initial_indent=margin,
            subsequent_indent=margin,
            break_on_hyphens=False,  # an option that is split could not be copied
        )


class _Help:
    """What commands and groups have in common."""

    rich_markup_mode: Any

    def get_help(self, ctx: Any) -> str:
        """The help, in the form that suits the width of the terminal."""
        if shutil.get_terminal_size().columns < NARROW:
            ctx.formatter_class = NarrowHelp
            self.rich_markup_mode = None
        shown: str = super().get_help(ctx)  # type: ignore[misc]
        return shown


class Command(_Help, TyperCommand):
    """A command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; where one is none of the choices, name the nearest."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            # typer checks values with pydantic, whose messages begin with this.
            error.message = error.message.replace("Value error, ", "")
            if match := NOT_A_CHOICE.search(error.message):
                choices = re.findall("'([^']*)'", match["choices"])
                meant = did_you_mean(match["said"][1:-1], choices)
                error.message = f"{error.message.removesuffix('.')}{meant}."
            raise


class Group(_Help, TyperGroup):
    """A group of commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is called; if there is none, name the nearest."""
        try:
            return super().resolve_command(ctx, args)
        except UsageError as error:
            if "Did you mean" not in error.message:  # typer knows only what was added before
                meant = did_you_mean(args[0], self.list_commands(ctx))
                error.message = f"{error.message.removesuffix('.')}{meant}."
            raise
