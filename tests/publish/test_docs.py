"""docs/publishing.md shows what the commands print."""

import shutil
from pathlib import Path

import pytest

from hub_server import MEMBER, HubServer, hub_environment
from sessions import check_sessions

ROOT = Path(__file__).parents[2]
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""Made by ``make test`` before the tests run."""


@pytest.mark.skipif(not VERIFIER.is_dir(), reason="make test makes the verifier")
def test_what_is_shown_is_what_is_printed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    with HubServer() as server:
        server.add_repo(f"HuggingFaceTB/{VERIFIER.name}", VERIFIER)
        environment = hub_environment(server, tmp_path / "cache", HF_TOKEN=MEMBER)
        assert check_sessions(ROOT / "docs" / "publishing.md", tmp_path, environment) == 4
