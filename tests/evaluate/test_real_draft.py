"""The real drafts in examples/, converted and evaluated: what conversion must keep."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CommandLine
from plain_draft import plain_draft
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.evaluate.report import Report

ROOT = Path(__file__).parents[2]
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""Made by ``make test`` before the tests run."""

DRAFT_TOKENS, NEW_TOKENS = 3, 24


def published_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint as it was published, read by torch or safetensors."""
    weights = directory / "pytorch_model.bin"
    if weights.exists():
        tensors: dict[str, Tensor] = torch.load(weights, weights_only=True)
        return tensors
    return load_file(directory / "model.safetensors")


@torch.inference_mode()
def plain_acceptance(directory: Path, prompt: list[int]) -> list[int]:
    """By verification step, how many drafted tokens are accepted: everything afresh each time.

    It shares nothing with the product: the published tensors are evaluated by ``plain_draft``.
    """
    verifier: Any = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)
    head = verifier.lm_head.weight
    tensors = published_tensors(directory) | {
        "embed_tokens.weight": verifier.model.embed_tokens.weight
    }
    config = json.loads((directory / "config.json").read_text())

    def states(tokens: list[int]) -> Tensor:
        result: Tensor = verifier.model(torch.tensor([tokens])).last_hidden_state[0]
        return result

    def best(state: Tensor) -> int:
        return int((head @ state.to(head.dtype)).argmax())

    tokens, accepted = [*prompt, best(states(prompt)[-1])], list[int]()
    while len(tokens) < len(prompt) + NEW_TOKENS:
        fed, drafted = states(tokens[:-1]).double(), list[int]()
        for _ in range(DRAFT_TOKENS):
            ids = torch.tensor([*tokens[1:], *drafted])
            fed = torch.cat([fed, plain_draft(tensors, config, ids, fed)[-1:]])
            drafted.append(best(fed[-1]))
        checked = [best(state) for state in states([*tokens, *drafted])[len(tokens) - 1 :]]
        right = next((i for i, t in enumerate(drafted) if t != checked[i]), DRAFT_TOKENS)
        accepted.append(right)
        tokens += checked[: right + 1]
    return accepted


@pytest.mark.parametrize("name", ["smollm2-135m-eagle1", "smollm2-135m-hass"])
def test_a_trained_draft_is_accepted_as_often_as_before_conversion(
    tmp_path: Path, speculators: CommandLine, name: str
) -> None:
    draft, report = tmp_path / "draft", tmp_path / "report"
    converting = ("convert", "eagle", ROOT / "examples" / name, draft, VERIFIER, "--no-validate")
    assert speculators(*converting).status == 0
    run = speculators(
        "evaluate", draft, "--limit=4", f"--max-new-tokens={NEW_TOKENS}",
        f"--num-draft-tokens={DRAFT_TOKENS}", "--output", report,
    )  # fmt: skip
    assert run.status == 0, run.stderr
    measured = Report.model_validate_json((report / "report.json").read_text())
    result = measured.results[0].overall
    assert result.identical == 4
    assert result.acceptance_length is not None
    assert result.acceptance_length > 1.3  # 1 is a draft that never guesses right

    messages = [message.model_dump() for message in read_prompts(OWN_PROMPTS)[0].messages]
    prompt: Any = AutoTokenizer.from_pretrained(VERIFIER).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    expected = plain_acceptance(ROOT / "examples" / name, prompt["input_ids"])
    found = measured.prompts[0].speculative[0].acceptance
    assert (found.steps, sum(found.accepted)) == (len(expected), sum(expected))
