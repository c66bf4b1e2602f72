"""The tables of docs/dflash.md are those of the code."""

import re

import pytest

from pages import ROOT
from speculators.families.dflash import DFLASH, DFLASH2, DSPARK
from speculators.families.dflash.native import PUBLISHERS

PAGE = (ROOT / "docs" / "dflash.md").read_text(encoding="utf-8")
CELL = re.compile(r" *\| *")
FAMILIES = (DFLASH, DFLASH2, DSPARK)


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first head is this."""
    found = re.search(rf"^\| {first} \|.*\n\|[ -|]*\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found
    return [CELL.split(line.removeprefix("| ")) for line in found[1].splitlines()]


def test_publishers() -> None:
    answers = {"yes |": True, "no |": False, "DSpark only |": None}
    told = [(row[0], answers[f"{row[2]} |"]) for row in table("publisher")]
    assert told == [(publisher.name, publisher.from_anchor) for publisher in PUBLISHERS]


def test_options() -> None:
    assert [row[0] for row in table("option")] == [f"`{it.flag}`" for it in DFLASH.options]
    assert DFLASH.options == DFLASH2.options == DSPARK.options


def test_keys() -> None:
    told = [key for row in table("key") for key in re.findall(r"`(\w+)`", row[0])]
    known = {key for family in FAMILIES for key in family.config.model_fields}
    assert sorted(told) == sorted(known)


@pytest.mark.parametrize("target", sorted({it for family in FAMILIES for it in family.targets}))
def test_targets(target: str) -> None:
    rows = {row[0].strip("`"): row[1:] for row in table("target")}
    having = [family for family in FAMILIES if target in family.targets]
    reader, *yes, lacks = rows[target][:5]
    assert {family.targets[target].reader for family in having} == {reader}
    assert yes == ["yes" if family in having else "no" for family in FAMILIES]
    common = frozenset.intersection(*(family.targets[target].lacks for family in having))
    assert lacks == "; ".join(having[0].features[feature] for feature in sorted(common, key=str))


def test_the_page_is_in_the_site() -> None:
    assert "dflash.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
