"""How results are printed: for people on a terminal, for programs in a pipe.

In a pipe nothing depends on the width of a window: lines are as long as they need to be, without
colours, borders, or trailing spaces. rich heeds NO_COLOR and FORCE_COLOR.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Column, Table

from speculators.errors import visible

__all__ = ["Listing", "bordered", "labelled", "show"]

UNLIMITED = 1 << 20
MANY_ROWS = 1000

BORDERLESS: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}


class Listing:
    """A table with heads, which may have many rows.

    On a terminal, cells that are too long for the window wrap. In a pipe, and if there are too many
    rows to look at, each row is one line: laying out 20,000 rows takes rich some seconds.
    """

    def __init__(self, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        self.heads = tuple(heads)
        self.rows = [tuple(map(visible, row)) for row in rows]

    def as_table(self) -> Table:
        """The rows as rich lays them out."""
        columns = (Column(head, overflow="fold") for head in self.heads)
        made = Table(*columns, header_style="bold", **BORDERLESS)
        for row in self.rows:
            made.add_row(*row)
        return made

    def lines(self) -> Iterator[str]:
        """The rows as lines of text, padded so that columns start at the same place."""
        rows = [self.heads, *self.rows] if any(self.heads) else self.rows
        widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (it + " " * (n - cell_len(it)) for it, n in zip(row, widths, strict=True))
            yield "  ".join(cells).rstrip()


def show(*renderables: RenderableType | Listing) -> None:
    """Print to standard output, one after another."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    for renderable in renderables:
        if isinstance(renderable, Listing):
            if console.is_terminal and len(renderable.rows) <= MANY_ROWS:
                console.print(renderable.as_table())
            else:
                print("\n".join(renderable.lines()))
        else:
            _print(console, renderable)


def _print(console: Console, renderable: RenderableType) -> None:
    if isinstance(renderable, str):
        renderable = "\n".join(map(visible, renderable.split("\n")))
    if console.is_terminal:
        console.print(renderable)
        return
    with console.capture() as capture:
        console.print(renderable)
    for line in capture.get().splitlines():
        print(line.rstrip())


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
