"""What a source distribution and a wheel hold, and what an index page would show of them."""

import re
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

from pages import ROOT

PACKAGE = ROOT / "src" / "speculators"

RELATIVE_LINK = re.compile(r"\]\((?!https?:|#)")


def build(source: Path, kind: str, output: Path) -> Path:
    """Build an sdist or a wheel of a source tree, with the installed hatchling."""
    code = f"import sys, hatchling.build as h; h.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(output)], cwd=source, check=True)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def unpacked(sdist: Path, tmp_path: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (directory,) = (tmp_path / "unpacked").iterdir()
    return directory


def contents(wheel: Path) -> tuple[set[str], Message]:
    """The names of its files, and its metadata."""
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return set(names), Parser().parsestr(archive.read(metadata).decode())


def test_a_source_distribution_has_no_weights(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {str(PurePosixPath(*PurePosixPath(it.name).parts[1:])) for it in archive}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= files
    assert not [name for name in files if name.endswith((".safetensors", ".bin", ".png"))]
    assert sdist.stat().st_size < 1_000_000


def test_a_wheel_built_from_it_has_the_whole_package(unpacked: Path, tmp_path: Path) -> None:
    names, metadata = contents(build(unpacked, "wheel", tmp_path / "wheel"))
    expected = {
        f"speculators/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert metadata["Name"] == "speculators"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_without_an_address_the_readme_names_files(unpacked: Path, tmp_path: Path) -> None:
    _, metadata = contents(build(unpacked, "wheel", tmp_path / "wheel"))
    readme = str(metadata.get_payload())
    assert metadata["Project-URL"] is None
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert RELATIVE_LINK.search((ROOT / "README.md").read_text("utf-8"))
    assert not RELATIVE_LINK.search(readme)
    assert "[docs/serving.md]" in readme


def test_an_address_is_told_in_one_place(unpacked: Path, tmp_path: Path) -> None:
    module = unpacked / "src" / "speculators" / "__init__.py"
    address = "https://example.org/speculators"
    text = module.read_text("utf-8")
    told = text.replace("HOMEPAGE: str | None = None", f"HOMEPAGE: str | None = {address!r}")
    assert told != text
    module.write_text(told, "utf-8")
    _, metadata = contents(build(unpacked, "wheel", tmp_path / "wheel"))
    readme = str(metadata.get_payload())
    assert metadata.get_all("Project-URL") == [f"Homepage, {address}"]
    assert not RELATIVE_LINK.search(readme)
    assert f"({address}/blob/HEAD/docs/serving.md#what-is-served)" in readme
    assert f"({address}/blob/HEAD/LICENSE)" in readme
