"""The real drafts in examples/, converted and evaluated: what conversion must keep."""

from pathlib import Path

import pytest

from helpers import CommandLine
from speculators.evaluate.report import Report

ROOT = Path(__file__).parents[2]
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""Made by ``make test`` before the tests run."""


@pytest.mark.parametrize("name", ["smollm2-135m-eagle1", "smollm2-135m-hass"])
def test_a_trained_draft_is_accepted_and_changes_nothing(
    tmp_path: Path, speculators: CommandLine, name: str
) -> None:
    draft, report = tmp_path / "draft", tmp_path / "report"
    converting = ("convert", "eagle", ROOT / "examples" / name, draft, VERIFIER, "--no-validate")
    assert speculators(*converting).status == 0
    run = speculators(
        "evaluate", draft, "--limit=4", "--max-new-tokens=24", "--num-draft-tokens=3",
        "--output", report,
    )  # fmt: skip
    assert run.status == 0, run.stderr
    result = Report.model_validate_json((report / "report.json").read_text()).results[0].overall
    assert result.identical == 4
    assert result.acceptance_length is not None
    assert result.acceptance_length > 1.3  # 1 is a draft that never guesses right
