"""The site builds without a warning: links, anchors and the navigation are not broken."""

import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pages import PAGES, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, str(ROOT / "docs" / "build_site.py"), str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'<a href="([^"#]+)" class="md-nav__link', start)
    built = {path.name for path in site.glob("*.html")} - {"404.html"}
    assert len(built) == len(PAGES)
    assert built == {"index.html", *map(posixpath.normpath, links)}


def test_pages_ask_no_other_server_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag in re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8")
        ):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page.name}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text(encoding="utf-8"))


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    """Including links to files that are not pages, which zensical does not check."""
    for page in site.glob("*.html"):
        for link in re.findall(r'href="([^"#?:]+)[^":]*"', page.read_text(encoding="utf-8")):
            if page.name != "404.html":
                assert (site / link).exists(), f"{page.name}: {link}"
    assert 'href="contributing.html' in (site / "architecture.html").read_text(encoding="utf-8")
