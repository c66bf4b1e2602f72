"""Build the site of the documentation: ``build_site.py DIRECTORY``.

In the repository a page is read as a file: its links are relative to that file, and the README is
not in docs/. A site has only one folder of pages. So this gathers all pages in one, turns their
links into links of the site, and leaves the rest to zensical, for which a warning is an error.
"""

import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
CONFIG = "mkdocs.yml"

OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
    "BENCHMARKS.md": "gpu.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/NOTES.md": "speed-notes.md",
    "examples/README.md": "examples.md",
    **{
        f"benchmarks/results/{path.name}": f"benchmarks-{path.name}"
        for path in (ROOT / "benchmarks" / "results").iterdir()
    },
}
"""What is not in docs/ → its name in the site."""

SIGNATURES = re.compile(r"\n<!-- not run: signatures.*?```python.*?```\n", re.DOTALL)
"""What docs/api.md shows in the repository, and the site in another way."""

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?P<path>[^)#\s]+)")


def site_page(source: str, text: str) -> str:
    """The text of a page as it is in the site: with its links, and without signatures.

    Args:
        source: the page's path in the repository.
        text: its Markdown.

    """

    def located(link: re.Match[str]) -> str:
        target = posixpath.normpath(PurePosixPath(source).parent / link["path"])
        return OUTSIDE.get(target) or posixpath.relpath(target, "docs")

    return LINK.sub(located, SIGNATURES.sub("", text))


def gather(pages: Path) -> None:
    """Put all pages, and what lies beside them in docs/, into one folder."""
    inside = {f"docs/{path.name}": path.name for path in (ROOT / "docs").iterdir()}
    for source, name in (inside | OUTSIDE).items():
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            (pages / name).write_text(site_page(source, text), encoding="utf-8")
        elif not source.endswith(".py"):
            shutil.copy(ROOT / source, pages / name)


def build(directory: Path) -> None:
    """Build the site into a directory, which is replaced.

    Raises:
        CalledProcessError: if there is an error or a warning, a broken link for example.

    """
    with TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "docs").mkdir()
        gather(project / "docs")
        shutil.copy(ROOT / CONFIG, project)
        (project / "src").symlink_to(ROOT / "src")
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        subprocess.run(command, cwd=project, check=True)
        if directory.exists():
            shutil.rmtree(directory)
        shutil.copytree(project / "site", directory)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
