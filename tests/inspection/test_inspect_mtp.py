"""What `inspect` says of a language model's MTP."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import CommandLine
from mtp_verifiers import VERIFIERS, mtp_of, write_verifier
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.inspection.findings import MtpFinding


def found(directory: Path) -> MtpFinding:
    mtp = inspect_checkpoint(directory).mtp
    assert mtp is not None
    return mtp


@pytest.mark.parametrize("kind", VERIFIERS)
def test_a_complete_mtp(tmp_path: Path, kind: str) -> None:
    mtp = found(write_verifier(tmp_path / "verifier", kind))
    tensors = mtp_of(kind)
    assert (mtp.state, mtp.missing, mtp.quantized) == ("complete", [], False)
    assert mtp.tensors == len(tensors)
    assert mtp.bytes == sum(it.nbytes for it in tensors.values())
    model = VERIFIERS[kind].config
    said = model.get("text_config", model).get(mtp.key)
    assert mtp.promised == said
    assert set(mtp.stored) == {"BF16"}


def test_a_promise_that_is_not_kept(tmp_path: Path, speculators: CommandLine) -> None:
    verifier = write_verifier(tmp_path / "verifier", "qwen3_5", mtp={})
    assert found(verifier).state == "missing"
    lines = speculators("inspect", verifier).stdout
    assert "missing, though config.json promises it (mtp_num_hidden_layers 1)" in lines
    assert f"speculators mtp graft {verifier} MTP OUT puts one back" in lines


def test_a_part_of_it(tmp_path: Path, speculators: CommandLine) -> None:
    mtp = mtp_of("deepseek_v3")
    lost = ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.1.gate_proj.weight"]
    for name in lost:
        del mtp[name]
    verifier = write_verifier(tmp_path / "verifier", "deepseek_v3", mtp=mtp)
    assert found(verifier).state == "incomplete"
    assert found(verifier).missing == lost
    assert f"missing: {', '.join(lost)}" in speculators("inspect", verifier).stdout


def test_how_it_is_quantized(tmp_path: Path, speculators: CommandLine) -> None:
    mtp = mtp_of("deepseek_v3")
    name = "model.layers.2.self_attn.o_proj.weight"
    mtp[name] = mtp[name].to(torch.float8_e4m3fn)
    settings: dict[str, Any] = {"quant_method": "fp8"}
    without = write_verifier(tmp_path / "without", "deepseek_v3", mtp=mtp)
    assert found(without).missing == [f"{name}_scale_inv"]
    mtp[f"{name}_scale_inv"] = torch.ones(1, 1)
    verifier = write_verifier(
        tmp_path / "verifier", "deepseek_v3", mtp=mtp, config={"quantization_config": settings}
    )
    finding = found(verifier)
    assert finding.quantized
    assert finding.stored["F8_E4M3 with weight_scale_inv"] == 1
    assert "model.layers.2.self_attn.q_a_proj" in finding.not_excluded
    assert "model.layers.2.self_attn.o_proj" not in finding.not_excluded
    printed = json.loads(speculators("inspect", verifier, "--json").stdout)
    assert printed["mtp"] == finding.model_dump()


def test_a_model_that_never_had_one(tmp_path: Path, speculators: CommandLine) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    assert inspect_checkpoint(verifier).mtp is None
    assert "\nmtp " not in speculators("inspect", verifier).stdout


def test_dspark_is_told_from_it(tmp_path: Path) -> None:
    stages = {"mtp.0.main_proj.weight": torch.zeros(2, 2)}
    finding = inspect_checkpoint(write_verifier(tmp_path / "verifier", mtp=stages))
    assert finding.mtp is None
    assert any("a stage of DSpark, not of an MTP" in note for note in finding.notes)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_experts"])
def test_what_a_config_counts_is_not_counted_up_to(tmp_path: Path, key: str) -> None:
    """A small file must not ask for large work."""
    verifier = write_verifier(tmp_path / "verifier", "qwen3_next")
    config = json.loads((verifier / "config.json").read_text())
    (verifier / "config.json").write_text(json.dumps(config | {key: 10**30}))
    assert found(verifier).state == "incomplete"


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "dynamic": [1]},
        {"quant_method": "gptq", "dynamic": ["-:mtp"]},
        {"quant_method": "fp8", "modules_to_not_convert": 5},
        {"quant_method": "fp8", "ignored_layers": {"mtp": 1}},
        {"quant_method": "compressed-tensors", "ignore": [None, 1]},
        {"quant_method": ["awq"]},
    ],
)
def test_lists_of_another_form_name_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    verifier = write_verifier(
        tmp_path / "verifier", "qwen3_next", config={"quantization_config": settings}
    )
    assert found(verifier).state == "complete"
