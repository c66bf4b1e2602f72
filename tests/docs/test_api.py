"""docs/api.md shows the signatures of the code."""

import runpy

from api import PAGE, page
from pages import ROOT


def test_the_signatures_are_those_of_the_code() -> None:
    """If not, ``python tests/api.py`` writes them anew."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
    assert text.count("```python") == text.count("\n::: ")


def test_the_site_shows_them_once() -> None:
    """There, mkdocstrings shows them with their docstrings."""
    site_page = runpy.run_path(str(ROOT / "docs" / "build_site.py"))["site_page"]
    shown = site_page("docs/api.md", PAGE.read_text(encoding="utf-8"))
    assert "```" not in shown
    assert "\n::: speculators.convert.eagle.EagleConverter\n" in shown
