"""What inspect says of EAGLE-3 drafts, published and converted."""

from pathlib import Path

import pytest

from eagle3 import GOLDEN3, NAMES, PARALLEL
from speculators.inspection.checkpoint import inspect_checkpoint

PUBLISHERS = {
    "eagle31_specforge": "SpecForge",
    "qwen3_specforge": "SpecForge",
    "modelopt_4aux": "ModelOpt",
    "fc_bias": "SafeAILab",
    "fullvocab": "SafeAILab",
    "sailab_llama": "SafeAILab",
    "target_hidden_48": "SafeAILab",
}

ASKS = {
    "eagle31_specforge": "conversion asks for --norm-output",
    "sailab_llama": "its config.json does not say which states it reads; it usually reads those "
    "entering the layers 2, n/2 and n-3",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_published_draft(tmp_path: Path, name: str) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(GOLDEN3 / name / file)
    found = inspect_checkpoint(tmp_path)
    assert (found.kind, found.family) == ("eagle3", "eagle3")
    assert found.conversion.possible
    assert found.conversion.command == f"speculators convert eagle3 {tmp_path} OUTPUT BASE_MODEL"
    assert found.facts["publisher"] == PUBLISHERS.get(name, "speculators")
    assert found.facts["drafts"] == ("320" if name == "fullvocab" else "96") + " of 320 tokens"
    assert found.verifier is not None
    assert found.verifier.hidden_size == (48 if name == "target_hidden_48" else 64)
    assert all(tensor.target for tensor in found.tensors)
    if name in ASKS:
        assert any(ASKS[name] in clause for clause in found.conversion.discrepancies)


def test_layers_are_shown_where_they_are_known(tmp_path: Path) -> None:
    for name, layers in (("modelopt_4aux", "2, 4, 5, 7"), ("norm_before_fc", "4, 6, 8")):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / file).symlink_to(GOLDEN3 / name / file)
        facts = inspect_checkpoint(folder).facts
        assert facts["reads"].endswith(f"those entering its layers {layers}")


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_draft(eagle3_drafts: dict[str, Path], name: str) -> None:
    found = inspect_checkpoint(eagle3_drafts[name])
    assert (found.kind, found.family) == ("speculators", "eagle3")
    assert found.notes == []
    kind = "peagle" if name == PARALLEL else "eagle3"
    assert found.evidence == [f"config.json says speculators_model_type {kind}"]
    after = name == "eagle31_specforge"
    assert (
        found.facts["feeds back"] == f"its output {'after' if after else 'before'} the final norm"
    )
    assert found.conversion.why_not is not None
    assert "converted already" in found.conversion.why_not
