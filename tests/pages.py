"""The pages of the documentation as the tests see them: fenced blocks, and how to test each.

The ``console`` and ``python`` blocks of a page run in order, in one directory, and have to print
what they show. A comment before a block, which readers do not see, makes an exception:

    <!-- not run: why -->          it is only shown
    <!-- not compared: why -->     it runs and has to succeed, but its output varies
    <!-- needs jq -->              it runs only if this program is installed
    <!-- file: batch.yaml -->      it is written into this file instead (any language)
    <!-- from: src/a.py -->        it does not run: its lines are in this file of the repository

In ``console`` a command follows ``$ ``, and continues after a backslash or in lines that begin with
``> ``. A command without output has to succeed, whatever it prints. A line of three dots matches
any lines; a time, a number of seconds, a commit or the loopback Hub's address matches any other.
In ``python``, the comments after a ``print`` are its output.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)

RUN = frozenset({"console", "python"})
SHOWN = frozenset({"json", "markdown", "text", "yaml"})

FENCE = re.compile(
    r"(?:^ *<!-- (?P<remark>(?:(?! -->).)*) -->\n\n?)?"
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*\n(?:> .*\n)*)((?:(?!\$ ).*\n)*)", re.MULTILINE)
PRINTED = re.compile(r"^print\(.*\)\n((?:# .*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        where: page and line.
        language: the word after the fence.
        text: what is between the fences, with a newline at its end.
        remark: the keyword of the comment before it: ``not run``, ``not compared``, ``needs``,
            ``file``, ``from`` or nothing.
        about: the rest of that comment.

    """

    where: str
    language: str
    text: str
    remark: str = ""
    about: str = ""

    @property
    def sessions(self) -> Iterator[tuple[str, str]]:
        """The commands of a ``console`` block, and the output shown for each."""
        if self.language != "console":
            return
        for command, shown in COMMAND.findall(self.text):
            yield re.sub(r"^> ", "", command, flags=re.MULTILINE), shown

    @property
    def printed(self) -> str:
        """The output shown in a ``python`` block."""
        return "".join(
            line.removeprefix("# ")
            for comments in PRINTED.findall(self.text)
            for line in comments.splitlines(keepends=True)
        )


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, given by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        remark, about = "", ""
        if said := re.fullmatch(
            r"(not run|not compared|needs|file|from):? (.+)", match["remark"] or ""
        ):
            remark, about = said[1], said[2]
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(f"{page}:{line}", match["language"], body, remark, about))
    return found
