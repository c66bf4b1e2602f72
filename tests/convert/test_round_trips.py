"""An export is read back without a question, and is the same draft."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from all_drafts import NAMES, Pair
from helpers import config_of, stored_tensors
from speculators.comparison.difference import compare
from speculators.comparison.side import open_sides
from speculators.convert.conversion import convert
from speculators.convert.export import export
from speculators.errors import ConversionError
from speculators.families.converted import open_converted

NOT_SAID = "speculators_config.proposal_methods"
"""What no layout but the format has a place for: how to speculate."""


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The config as it is written, with dots between its levels."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(tmp_path: Path, all_drafts: dict[str, Pair], name: str) -> None:
    draft = all_drafts[name]
    family = open_converted(draft.converted).family
    before = flat(config_of(draft.converted))
    del before[NOT_SAID]
    for to in family.targets:
        try:
            out = export(draft.converted, tmp_path / to, to)
        except ConversionError:
            continue
        back = convert(out, tmp_path / f"{to} back", draft.verifier, validate=False)
        after = flat(config_of(back))
        del after[NOT_SAID]
        differ = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert differ == set(), to
        for found in (compare(*open_sides((draft.converted, it))) for it in (out, back)):
            assert found.same, (to, found)


def test_added_zeros_that_were_trained_since_are_not_dropped(
    tmp_path: Path, all_drafts: dict[str, Pair]
) -> None:
    draft = all_drafts["llama31_gqa_nobias"]
    out = export(draft.converted, tmp_path / "out", "sglang")
    assert config_of(out)["exported_zeros"] == ["fc.bias"]
    tensors = stored_tensors(out)
    tensors["fc.bias"][3] = 1.0
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ConversionError, match=r"fc\.bias is not zero, but .* exported_zeros"):
        convert(out, tmp_path / "back", draft.verifier, validate=False)


def test_numbers_are_written_as_they_were_read(all_drafts: dict[str, Pair]) -> None:
    draft = all_drafts["dflash_e2e"]
    for directory in (draft.source, draft.converted):
        assert '"rope_theta": 1000000,\n' in (directory / "config.json").read_text()
    assert (
        '"rope_theta": 500000.0'
        in (all_drafts["llama31_gqa_nobias"].converted / "config.json").read_text()
    )
