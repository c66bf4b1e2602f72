"""The Dockerfile agrees with the repository; where there is Docker, its build runs the doctor."""

import re
from fnmatch import fnmatch
from pathlib import Path

from pages import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line.strip() for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]


def arguments(instruction: str) -> list[str]:
    return [
        line.removeprefix(instruction).strip() for line in LINES if line.split()[0] == instruction
    ]


def is_sent(path: str) -> bool:
    """Whether a path is part of the build's context, by .dockerignore: the last match decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if fnmatch(path, pattern) or fnmatch(f"/{path}", pattern.replace("**", "*")):
                sent = line.startswith("!")
    return sent


def test_what_is_copied_is_there_and_sent() -> None:
    copied = [
        source
        for line in arguments("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    ]
    assert "src" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source
    assert not is_sent(".git")
    assert not is_sent("src/speculators/__pycache__")


def test_what_a_build_reads_is_copied() -> None:
    """All that pyproject.toml and its hook name, but for what only the sdist has."""
    (files,) = [line for line in arguments("COPY") if "pyproject.toml" in line]
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE"} <= {*files.split()}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nlicense-files = ["LICENSE"]\n' in project
    assert '\nspeculators = "speculators.__main__:run"\n' in project
    assert arguments("ENTRYPOINT") == ['["speculators"]']


def test_torch_is_the_tested_one_for_cpus() -> None:
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    installed = [line for line in arguments("RUN") if "torch==" in line]
    assert installed == [f'pip install torch=={pinned} --index-url "$TORCH_INDEX"']
    assert arguments("ARG")[0].endswith("/whl/cpu")


def test_it_does_not_run_as_root() -> None:
    last = TEXT.rpartition("\nFROM ")[2]
    assert re.search(r"^USER speculators$", last, re.MULTILINE)
    assert "useradd --uid 1000 speculators" in last
    assert last.index("USER speculators") < last.index("ENTRYPOINT")
    assert Path("/data") == Path(arguments("WORKDIR")[-1])
