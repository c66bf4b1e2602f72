"""How results are printed: for people on a terminal, for programs in a pipe.

In a pipe nothing depends on the width of a window: lines are as long as they need to be,
without colours, borders, or spaces at their ends. rich heeds NO_COLOR and FORCE_COLOR.
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table

__all__ = ["bordered", "labelled", "show", "table"]

UNLIMITED = 1 << 20

BORDERLESS: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}


def show(*renderables: RenderableType) -> None:
    """Print to standard output, one after another."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
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
    """Rows under heads; a cell that is too long for the window goes on below."""
    made = Table(
        *(Column(head, overflow="fold") for head in heads), header_style="bold", **BORDERLESS
    )
    for row in rows:
        made.add_row(*row)
    return made


def bordered(*columns: str | Column) -> Table:
    """A table without rows as yet, which has borders on a terminal."""
    return Table(*columns, **({} if Console().is_terminal else BORDERLESS))


def labelled(lines: Iterable[tuple[str, Iterable[str]]]) -> Table:
    """Labels at the left, and at the right of each its sentences, below one another."""
    made = Table.grid(Column(style="bold"), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for label, sentences in lines:
        for index, sentence in enumerate(sentences):
            made.add_row("" if index else label, sentence)
    return made
