"""docs/batch.md shows what the commands print, and tells of every key."""

import re
import shutil
from pathlib import Path

import pytest

from sessions import check_sessions
from speculators.batch.manifest import Conversion

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "batch.md"
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""Made by ``make test`` before the tests run."""


@pytest.mark.skipif(not VERIFIER.is_dir(), reason="make test makes the verifier")
def test_what_is_shown_is_what_is_printed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / VERIFIER.name).symlink_to(VERIFIER)
    assert check_sessions(PAGE, tmp_path, {"HF_HUB_OFFLINE": "1"}) == 8


def test_every_key_is_told() -> None:
    told = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert told == [field.alias or name for name, field in Conversion.model_fields.items()]
