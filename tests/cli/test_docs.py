"""docs/inspect.md and docs/cli.md show what the commands print; the schemas are the code's."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from speculators.convert.families import FAMILIES
from speculators.inspection.findings import Finding
from speculators.inspection.installation import Diagnosis

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.MULTILINE)


def sessions() -> Iterator[tuple[str, str]]:
    """Commands and what they print, from blocks that say ``console``."""
    for page in ("inspect.md", "cli.md"):
        for block in re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            yield from re.findall(r"\$ (.*)\n((?:(?!\$ ).*\n)*)", block)


@pytest.mark.parametrize(("command", "shown"), [*sessions()])
def test_what_is_shown_is_what_is_printed(tmp_path: Path, command: str, shown: str) -> None:
    """A line of three dots stands for lines that are left out."""
    program = tmp_path / "speculators"
    program.write_text(
        f"#!{sys.executable}\nfrom speculators.cli import main\nif __name__ == '__main__': main()\n"
    )
    program.chmod(0o755)
    done = subprocess.run(
        command,
        shell=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COLUMNS": "80"},
    )
    expected = re.escape(TIME.sub("TIME", shown)).replace("\\.\\.\\.\\\n", r"(?:.*\n)*")
    assert re.fullmatch(expected, TIME.sub("TIME", done.stdout)), done.stdout


def test_there_are_sessions() -> None:
    assert len(list(sessions())) >= 3


@pytest.mark.parametrize(
    ("name", "model"), [("inspect", Finding), ("doctor", Diagnosis)], ids=["inspect", "doctor"]
)
def test_the_schema(name: str, model: type[BaseModel]) -> None:
    """Made anew by ``json.dumps(model.model_json_schema(mode="serialization"), indent=2)``."""
    schema = json.loads((DOCS / f"{name}.schema.json").read_text(encoding="utf-8"))
    assert schema == model.model_json_schema(mode="serialization")


def test_every_kind_is_described() -> None:
    page = (DOCS / "inspect.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        assert f"\n| `{family.kind}` |" in page


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_loop_over_directories(tmp_path: Path) -> None:
    page = (DOCS / "inspect.md").read_text(encoding="utf-8")
    script = re.search(r"```sh\n(.*?)```", page, re.DOTALL)
    assert script
    program = tmp_path / "speculators"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m speculators "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        script[1],
        shell=True,
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT / "tests" / "golden",
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert len(done.stdout.splitlines()) == 5
    assert "speculators convert eagle qwen2_qkv_bias OUTPUT BASE_MODEL" in done.stdout
