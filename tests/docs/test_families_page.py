"""The table of docs/families.md is that of the registry."""

import families_page
from pages import ROOT


def test_the_table_is_current() -> None:
    """If not, ``python tests/families_page.py`` writes it anew."""
    assert families_page.PAGE.read_text(encoding="utf-8") == families_page.page()


def test_every_kind_has_a_row() -> None:
    assert len(families_page.table().splitlines()) == 2 + len(list(families_page.rows()))


def test_the_page_is_in_the_site() -> None:
    assert "families.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
