"""The table of types in docs/mtp.md is that of the code."""

import re

from pages import ROOT
from speculators.mtp.types import NAMED_ONLY, TYPES

PAGE = (ROOT / "docs" / "mtp.md").read_text(encoding="utf-8")


def test_types() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| `(\w+)` \|$", PAGE, re.MULTILINE)
    told = [(name, re.findall(r"`(\w+)`", models), key) for name, models, key in rows]
    assert told == [(it.name, sorted(it.model_types), it.key) for it in TYPES]


def test_those_known_by_name() -> None:
    text = " ".join(PAGE.split())
    found = re.search(r"The MTPs of ([^.]+) are known by name only", text)
    assert found
    told = set(re.split(r", | and ", found[1]))
    assert told == {it for it in NAMED_ONLY.values() if it != "Step5-VL"}
