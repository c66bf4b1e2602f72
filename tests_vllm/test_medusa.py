"""Medusa heads as they are published, served by the last release of vLLM that knows them."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from drafts import VERIFIER, noise
from processes import ENGINE, LENGTH, WITHOUT_PLUGINS, Outcomes, run
from speculators.inspection.checkpoint import inspect_checkpoint

pytestmark = pytest.mark.exhaustive
PROMPTS = [[5, 6, 7, 8, 9, 10, 11 + number] for number in range(4)]


def heads() -> dict[str, Tensor]:
    """Three heads of one layer, in the research code's names, whose biases matter."""
    model: Any = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)
    matrix = model.get_output_embeddings().weight.detach()
    hidden = matrix.shape[1]
    tensors: dict[str, Tensor] = {}
    for head in range(LENGTH):
        tensors |= {
            f"{head}.0.linear.weight": noise(hidden, hidden, seed=head) / hidden**0.5,
            f"{head}.0.linear.bias": 2 * noise(hidden, seed=10 + head),
            f"{head}.1.weight": matrix.clone(),
        }
    return tensors


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Outcomes]:
    root = tmp_path_factory.mktemp("medusa")
    directory, tensors = root / "medusa", heads()
    directory.mkdir()
    weights = directory / "medusa_lm_head.pt"
    torch.save(tensors, weights)
    published = {
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "medusa_num_heads": LENGTH,
        "medusa_num_layers": 1,
    }
    (directory / "config.json").write_text(json.dumps(published))
    (note,) = (it for it in inspect_checkpoint(weights).notes if "medusa_fc_bias" in it)
    config = json.loads(note[note.index("{") : note.index("}") + 1])
    (directory / "config.json").write_text(json.dumps(config))
    speculation = {
        "method": "medusa",
        "model": str(directory),
        "num_speculative_tokens": LENGTH,
    }
    engines = {
        "plain": ENGINE,
        "medusa": ENGINE | {"speculative_config": speculation},
    }
    return tensors, run(root / "outcomes.json", PROMPTS, engines, WITHOUT_PLUGINS)


def test_outputs_are_the_verifiers(served: tuple[dict[str, Tensor], Outcomes]) -> None:
    _, outcomes = served
    assert not outcomes.refused
    assert outcomes.answers["medusa"].tokens == outcomes.answers["plain"].tokens


def test_it_drafts_what_the_heads_say(served: tuple[dict[str, Tensor], Outcomes]) -> None:
    """Each head's best token after the prompt, by elementary operations, biases included."""
    tensors, outcomes = served
    model: Any = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)
    for prompt, proposals in zip(PROMPTS, outcomes.answers["medusa"].proposals, strict=True):
        with torch.no_grad():
            x = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        expected = []
        for head in range(LENGTH):
            weight, bias = tensors[f"{head}.0.linear.weight"], tensors[f"{head}.0.linear.bias"]
            y = x + torch.nn.functional.silu(weight @ x + bias)
            expected.append(int((tensors[f"{head}.1.weight"] @ y).argmax()))
        assert expected in proposals[:2]
