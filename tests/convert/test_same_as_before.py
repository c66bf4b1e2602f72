"""Another build converts a checkpoint into the same bytes, and accepts what an earlier one wrote.

``tests/recorded`` holds what version 1.0.0.dev0 wrote on 27 November 2026: the SHA-256 of each file
(with the verifier's path replaced by ``VERIFIER``), and two directories that were validated, whose
source and verifier are not here. A difference in these bytes is a change of the format: users see
it in every draft that they convert again.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from helpers import GOLDEN, GOLDEN_NAMES
from speculators.convert.eagle import EagleConverter

convert = EagleConverter().convert
validate = EagleConverter().validate

RECORDED = Path(__file__).parents[1] / "recorded"
DIGESTS: dict[str, dict[str, str]] = json.loads((RECORDED / "digests.json").read_text())
EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCES = {
    path.name: path
    for path in [
        *(GOLDEN / name for name in GOLDEN_NAMES),
        *(EXAMPLES / f"smollm2-135m-{name}" for name in ("eagle1", "hass", "layernorms")),
    ]
}
VALIDATED = sorted(path.parent.name for path in RECORDED.glob("*/conversion.json"))


def verifier_of_sizes(source: Path, directory: Path) -> Path:
    """What a conversion without validation needs of a verifier: a config."""
    config = json.loads((source / "config.json").read_text())
    sizes = {key: config[key] for key in ("hidden_size", "vocab_size")}
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], **sizes})
    )
    return directory


def test_every_draft_is_recorded_in_both_ways() -> None:
    assert DIGESTS.keys() == {*SOURCES, *(f"{name} as bfloat16" for name in SOURCES)}
    assert len(VALIDATED) == 2


@pytest.mark.parametrize("recorded", DIGESTS)
def test_the_bytes_are_those_of_the_build_before(tmp_path: Path, recorded: str) -> None:
    name, _, dtype = recorded.partition(" as ")
    verifier = verifier_of_sizes(SOURCES[name], tmp_path / "verifier")
    out = convert(SOURCES[name], tmp_path / "out", verifier, validate=False, dtype=dtype or None)
    path = str(verifier.resolve()).encode()
    found = {
        file: (out / file).read_bytes().replace(path, b"VERIFIER") for file in DIGESTS[recorded]
    }
    assert {file: hashlib.sha256(data).hexdigest() for file, data in found.items()} == DIGESTS[
        recorded
    ]


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("name", VALIDATED)
def test_a_directory_of_the_build_before_is_valid(
    tmp_path: Path, log: list[str], name: str, with_source: bool
) -> None:
    """Its weights have the same bytes today, which the test above shows, so they are made here."""
    out = tmp_path / "out"
    shutil.copytree(RECORDED / name, out)
    verifier = verifier_of_sizes(GOLDEN / name, tmp_path / "verifier")
    today = convert(GOLDEN / name, tmp_path / "today", verifier, validate=False)
    shutil.copy(today / "model.safetensors", out)
    validate(out, GOLDEN / name if with_source else None)
    assert log[-1].startswith(f"SUCCESS Valid: {out}. Proven: it has the ")
    warnings = [line for line in log if line.startswith("WARNING")]
    assert any("/srv/models/verifier" in line for line in warnings)
