"""MTPs that were cut and grafted, served by the real vLLM: GLM-4-MoE runs on the CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from drafts import VERIFIER
from processes import ENGINE, WITHOUT_PLUGINS, Outcomes, run
from speculators.mtp.cut import cut
from speculators.mtp.graft import graft

HIDDEN, LAYERS = 64, 2
PROMPTS = [[5, 6, 7, 8, 9, 10, 11 + number] for number in range(8)]


def write_verifier(directory: Path) -> Path:
    """A small GLM-4-MoE with an MTP, whose next token depends almost only on the last one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": json.loads((VERIFIER / "config.json").read_text())["vocab_size"],
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.002)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    last, mtp = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    for name in [it for it in tensors if it.startswith(last)]:
        tensors[mtp + name.removeprefix(last)] = tensors[name].clone()
    passed_on = torch.cat((torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)), 1)
    tensors[f"{mtp}eh_proj.weight"] = passed_on
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{mtp}{norm}.weight"] = torch.ones(HIDDEN)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    said = {"num_nextn_predict_layers": 1, "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(written | said))
    for file in VERIFIER.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    root = tmp_path_factory.mktemp("mtp")
    verifier = write_verifier(root / "verifier")
    mtp = cut(verifier, root / "mtp")
    lost = root / "lost"
    shutil.copytree(verifier, lost)
    tensors = load_file(lost / "model.safetensors")
    body = {name: it for name, it in tensors.items() if f"layers.{LAYERS}." not in name}
    save_file(body, lost / "model.safetensors", metadata={"format": "pt"})
    grafted = graft(lost, mtp, root / "grafted")
    speculation: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}
    engines: dict[str, dict[str, Any]] = {
        "plain": {"model": str(lost)},
        "published": {"model": str(verifier), "speculative_config": speculation},
        "cut": {"model": str(lost), "speculative_config": speculation | {"model": str(mtp)}},
        "grafted": {"model": str(grafted), "speculative_config": speculation},
    }
    return run(
        root / "outcomes.json",
        PROMPTS,
        {name: ENGINE | engine for name, engine in engines.items()},
        WITHOUT_PLUGINS,
    )


def test_every_engine_starts(outcomes: Outcomes) -> None:
    assert not outcomes.refused
    assert outcomes.answers.keys() == {"plain", "published", "cut", "grafted"}


@pytest.mark.parametrize("name", ["cut", "grafted"])
def test_it_drafts_as_it_was_published(outcomes: Outcomes, name: str) -> None:
    published = outcomes.answers["published"]
    assert outcomes.answers[name] == published
    assert sum(published.accepted) > 0


def test_outputs_are_the_verifiers(outcomes: Outcomes) -> None:
    plain = outcomes.answers["plain"]
    assert all(one.tokens == plain.tokens for one in outcomes.answers.values())
