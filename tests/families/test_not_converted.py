"""What asks for a converted draft says of others what to do with them."""

from pathlib import Path

import pytest

from helpers import GOLDEN, PLAIN, CommandLine
from mtp_verifiers import write_verifier
from speculators.errors import FormatError
from speculators.models.loading import load_draft
from speculators.mtp.cut import cut

WHAT = (
    "holds an MTP head of the Qwen type, which is not converted: no engine reads it in the "
    "speculators format, so it stays in its native layout: `speculators mtp graft` puts it into "
    "its verifier's checkpoint, `speculators mtp cut` takes it out, and `speculators evaluate` "
    "measures it (those other than Qwen's with --server)."
)


@pytest.fixture
def mtp(tmp_path: Path) -> Path:
    return cut(write_verifier(tmp_path / "verifier"), tmp_path / "mtp")


def test_an_mtp(mtp: Path, tmp_path: Path, speculators: CommandLine) -> None:
    for command in (("validate", mtp), ("export", mtp, tmp_path / "out", "--to", "vllm")):
        run = speculators(*command)
        assert run.status == 1
        assert run.errors == [f"{mtp} {WHAT}"]
    with pytest.raises(FormatError) as caught:
        load_draft(mtp)
    assert str(caught.value) == f"{mtp} {WHAT}"


def test_a_language_model_is_no_draft(tmp_path: Path, speculators: CommandLine) -> None:
    verifier = write_verifier(tmp_path / "verifier")
    run = speculators("validate", verifier)
    (error,) = run.errors
    assert error == (
        f"Missing or incorrect speculators_model_type in {verifier}: it holds a whole language "
        "model; give a draft in its place, and the language model as the verifier (BASE_MODEL)."
    )


def test_a_research_checkpoint_is_to_be_converted() -> None:
    with pytest.raises(FormatError, match="Convert the checkpoint first"):
        load_draft(GOLDEN / PLAIN)
