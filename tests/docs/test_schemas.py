"""The schemas in docs/ are those of the code, and the pages explain every key."""

import json
import re
from pathlib import Path

import pytest

from pages import ROOT
from schemas import PRINTED, READ, schema, schema_file
from speculators.batch.manifest import Entry
from speculators.families.registry import families, options_of, signatures

DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", READ | PRINTED)
def test_the_documented_schema_is_that_of_the_code(name: str) -> None:
    """If not, ``python tests/schemas.py`` writes it anew."""
    assert json.loads(schema_file(name).read_text(encoding="utf-8")) == json.loads(schema(name))


def test_there_is_no_other_schema() -> None:
    assert {path.name for path in DOCS.glob("*.schema.json")} == {
        schema_file(name).name for name in READ | PRINTED
    }


@pytest.mark.parametrize("name", READ | PRINTED)
def test_every_part_of_a_schema_is_described(name: str) -> None:
    parsed = json.loads(schema(name))
    for part in [parsed, *parsed.get("$defs", {}).values()]:
        assert part["description"]


@pytest.mark.parametrize(
    ("name", "page"), [("config", "format.md"), ("conversion", "provenance.md")]
)
def test_every_key_of_a_file_is_described(name: str, page: str, converted: dict[str, Path]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for directory in converted.values():
        for key in json.loads((directory / f"{name}.json").read_text(encoding="utf-8")):
            assert f"`{key}" in text, key


def test_every_kind_is_described() -> None:
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    for signature, _ in signatures():
        assert f"\n| `{signature.kind}` |" in page


def test_every_key_of_a_manifest_is_described() -> None:
    page = (DOCS / "batch.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.MULTILINE)
    told = [key for row in rows for key in re.findall(r"\w+", row)]
    common = [field.alias or name for name, field in Entry.model_fields.items()]
    flags = [flag.feature for family in families() for flag in family.flags]
    options = [option.name for option in options_of(None)]
    assert sorted(told) == sorted(common + flags + options)
