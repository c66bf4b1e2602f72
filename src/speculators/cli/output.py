"""How results are printed: for people on a terminal, for programs in a pipe.

In a pipe nothing depends on the width of a window: lines are as long as they need to be, without
colours, borders, or trailing spaces. rich heeds NO_COLOR and FORCE_COLOR.
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table

from speculators.errors import visible

__all__ = ["bordered", "labelled", "show", "table"]

UNLIMITED = 1 << 20

BORDERLESS: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}


def show(*renderables: RenderableType) -> None:
    """Print to standard output, one after another."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    renderables = tuple(
        "\n".join(map(visible, it.split("\n"))) if isinstance(it, str) else it for it in renderables
    )
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        for renderable in renderables:
            console.print(renderable)
        return
    console.width = UNLIMITED
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    for line in capture.get().splitlines():
        print(line.rstrip())


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table with heads; cells that are too long for the window wrap."""
    made = Table(
        *(Column(head, overflow="fold") for head in heads), header_style="bold", **BORDERLESS
    )
    for row in rows:
        made.add_row(*map(visible, row))
    return made


def bordered(*columns: str | Column) -> Table:
    """A table without rows yet, with borders on a terminal."""
    return Table(*columns, **({} if Console().is_terminal else BORDERLESS))


def labelled(lines: Iterable[tuple[str, Iterable[str]]]) -> Table:
    """Labels on the left, and to the right of each its sentences, one per line."""
    made = Table.grid(Column(style="bold"), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for label, sentences in lines:
        for index, sentence in enumerate(sentences):
            made.add_row("" if index else label, visible(sentence))
    return made
