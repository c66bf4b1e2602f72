"""The table of docs/eagle3.md on exports, made from the code: ``python tests/export_table.py``."""

import re
from pathlib import Path

from speculators.families.eagle3 import EAGLE3
from speculators.families.eagle3.export import TARGETS

PAGE = Path(__file__).parents[1] / "docs" / "eagle3.md"
TABLE = re.compile(r"(?<=<!-- made: exports -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)


def table() -> str:
    """A row for everything that some reader cannot compute, and a column for each reader."""
    cannot: dict[str, set[str]] = {}
    for name, target in TARGETS.items():
        features = [EAGLE3.features[it] for it in EAGLE3.features if it in target.lacks]
        for what in features:
            cannot.setdefault(what, set()).add(name)
    for name, target in TARGETS.items():
        for it in target.limits:
            cannot.setdefault(it.what, set()).add(name)
        if target.activation is not None:
            other = f"an activation other than {target.activation}"
            cannot.setdefault(other, set()).add(name)
    head = ["", *(f"`{name}`" for name in TARGETS)]
    rows = [
        head,
        ["---"] * len(head),
        *([what, *("no" if it in by else "" for it in TARGETS)] for what, by in cannot.items()),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: table(), page), encoding="utf-8")
