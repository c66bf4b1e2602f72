"""The table of docs/families.md, made from the registry.

``python tests/families_page.py`` writes it.
"""

from collections.abc import Iterator
from pathlib import Path

from speculators.families.family import Family
from speculators.families.registry import signatures
from speculators.families.signature import ENGINES, Signature

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
START, END = "<!-- made from the registry -->\n", "<!-- end -->\n"

NOTHING = "no"


def rows() -> Iterator[tuple[str, ...]]:
    """Kind, what it is, how each engine serves it, and what to do with it."""
    for signature, family in signatures():
        yield (
            f"`{signature.kind}`",
            signature.title,
            *(_served(signature, engine) for engine in ENGINES),
            _todo(signature, family),
        )


def _served(signature: Signature, engine: str) -> str:
    for serving in signature.serving or ():
        if serving.engine == engine:
            last = f"up to {serving.until}: " if serving.until else ""
            note = f" ({serving.note})" if serving.note else ""
            return f"{last}{serving.option}{note}"
    return "" if signature.serving is None else NOTHING


def _todo(signature: Signature, family: Family | None) -> str:
    if family is None:
        return signature.advice or ""
    targets = ", ".join(f"`{name}`" for name in family.targets)
    return f"`speculators convert {family.name}`; `export` to {targets}"


def table() -> str:
    """The table in Markdown."""
    heads = ("kind", "what it is", *ENGINES, "what to do with it here")
    lines = [heads, ("---",) * len(heads), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """The page with the table as the registry has it."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
