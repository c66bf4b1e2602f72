"""The tables of docs/eagle3.md are those of the code."""

import re
from pathlib import Path

import export_table
from pages import ROOT
from speculators.families.eagle3 import EAGLE3, Eagle3Config
from speculators.families.eagle3.publishers import PUBLISHERS

PAGE = (ROOT / "docs" / "eagle3.md").read_text(encoding="utf-8")
CELL = re.compile(r" *\| *")


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first head is this."""
    found = re.search(rf"^\| {first} \|.*\n\|[ -|]*\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found
    return [CELL.split(line.strip("| ")) for line in found[1].splitlines()]


def test_publishers() -> None:
    numberings = {"input": "the state that enters", "output": "the state that leaves"}
    assert [[row[0], *row[2:]] for row in table("publisher")] == [
        [
            publisher.name,
            numberings.get(publisher.numbering or "", "asked for"),
            "fed back" if publisher.feeds_back else "asked for",
        ]
        for publisher in PUBLISHERS
    ]


def test_options() -> None:
    assert [row[0] for row in table("option")] == [f"`{it.flag}`" for it in EAGLE3.options]


def test_tensors() -> None:
    def spelled_out(name: str) -> list[str]:
        found = re.search(r"\{(\w(?:,\w)+|gate,up|gate,up,down)\}", name)
        if not found:
            return [name]
        return [name.replace(found[0], part) for part in found[1].split(",")]

    told = [name for row in table("tensor") for name in spelled_out(row[0].strip("`"))]
    known = {
        re.sub(r"layers\.0\.(?!hidden_norm)", "layers.{layer}.", it.name) for it in EAGLE3.tensors
    }
    assert sorted(told) == sorted(known)


def test_keys() -> None:
    told = [key for row in table("key") for key in re.findall(r"`(\w+)`", row[0])]
    assert sorted(told) == sorted(Eagle3Config.model_fields)


def test_targets() -> None:
    told = {row[0].strip("`"): row[1] for row in table("target")}
    assert told == {name: target.reader for name, target in EAGLE3.targets.items()}


def test_what_readers_cannot_compute() -> None:
    """`python tests/export_table.py` writes it."""
    found = export_table.TABLE.search(PAGE)
    assert found
    assert found[0] == export_table.table()


def test_the_page_is_in_the_site() -> None:
    assert "eagle3.md" in (Path(ROOT) / "mkdocs.yml").read_text(encoding="utf-8")
