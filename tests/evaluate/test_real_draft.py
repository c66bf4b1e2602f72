"""The real drafts in examples/, converted and evaluated: their acceptance must not change."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CommandLine
from plain_draft import plain_draft, plain_norm
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.evaluate.report import Report

ROOT = Path(__file__).parents[2]
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""``make test`` creates this before the tests run."""

DRAFT_TOKENS = 3


def published_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint as published, read by torch or safetensors."""
    weights = directory / "pytorch_model.bin"
    if weights.exists():
        tensors: dict[str, Tensor] = torch.load(weights, weights_only=True)
        return tensors
    return load_file(directory / "model.safetensors")


@torch.inference_mode()
def plain_acceptance(
    verifier: Any, tensors: dict[str, Tensor], config: dict[str, Any], prompt: list[int], new: int
) -> list[int]:
    """The number of drafted tokens accepted in each step to ``new`` tokens, without any cache.

    It shares no code with the product: the published tensors are evaluated by ``plain_draft``. A
    pass that checks drafted tokens also gives the states of those that are accepted.
    """
    head = verifier.lm_head.weight
    tensors = tensors | {"embed_tokens.weight": verifier.model.embed_tokens.weight}
    tensors = {name: tensor.double() for name, tensor in tensors.items()}  # once

    def states(tokens: list[int]) -> Tensor:
        result: Tensor = verifier.model(torch.tensor([tokens])).last_hidden_state[0]
        return result

    def best(state: Tensor) -> int:
        return int((head @ state.to(head.dtype)).argmax())

    seen, accepted = states(prompt), list[int]()
    tokens = [*prompt, best(seen[-1])]
    while len(tokens) < len(prompt) + new:
        fed, drafted = seen[: len(tokens) - 1].double(), list[int]()
        for _ in range(DRAFT_TOKENS):
            ids = torch.tensor([*tokens[1:], *drafted])
            fed = torch.cat([fed, plain_draft(tensors, config, ids, fed)[-1:]])
            drafted.append(best(plain_norm(tensors, config, "lm_head_layernorm", fed[-1])))
        seen = states([*tokens, *drafted])
        checked = [best(state) for state in seen[len(tokens) - 1 :]]
        right = next((i for i, t in enumerate(drafted) if t != checked[i]), DRAFT_TOKENS)
        accepted.append(right)
        tokens += checked[: right + 1]
    return accepted


@pytest.fixture(scope="module")
def verifier() -> Any:
    return AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)


@pytest.mark.parametrize(
    ("prompts", "compared", "tokens"),
    [(1, 1, 16), pytest.param(4, 2, 24, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("name", ["eagle1", "hass", "layernorms"])
def test_a_trained_draft_is_accepted_as_often_as_before_conversion(
    tmp_path: Path,
    speculators: CommandLine,
    verifier: Any,
    name: str,
    prompts: int,
    compared: int,
    tokens: int,
) -> None:
    """One prompt, which is compared; exhaustive: four, of which two are compared, and longer."""
    published = ROOT / "examples" / f"smollm2-135m-{name}"
    draft, report = tmp_path / "draft", tmp_path / "report"
    converting = ("convert", "eagle", published, draft, VERIFIER, "--no-validate")
    assert speculators(*converting).status == 0
    run = speculators(
        "evaluate", draft, f"--limit={prompts}", f"--max-new-tokens={tokens}",
        f"--num-draft-tokens={DRAFT_TOKENS}", "--output", report,
    )  # fmt: skip
    assert run.status == 0, run.stderr
    measured = Report.model_validate_json((report / "report.json").read_text())
    result = measured.results[0].overall
    assert result.identical == prompts
    assert result.acceptance_length is not None
    assert result.acceptance_length > 1.8  # 1 is a draft that never guesses right

    tensors = published_tensors(published)
    config = json.loads((published / "config.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER)
    asked = read_prompts(OWN_PROMPTS)[:compared]
    for prompt, found in zip(asked, measured.prompts[:compared], strict=True):
        ids = tokenizer.apply_chat_template(
            [message.model_dump() for message in prompt.messages],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        expected = plain_acceptance(verifier, tensors, config, ids, tokens)
        acceptance = found.speculative[0].acceptance
        assert (acceptance.steps, sum(acceptance.accepted)) == (len(expected), sum(expected))


def test_the_eagle3_draft_is_accepted_as_often_as_by_its_training_code(
    tmp_path: Path, speculators: CommandLine, verifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``examples/measure_drafts.py`` drafts with the published tensors, without a cache."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    measure_drafts = importlib.import_module("measure_drafts")
    published = ROOT / "examples" / "smollm2-135m-eagle3"
    draft, report = tmp_path / "draft", tmp_path / "report"
    converting = ("convert", "eagle3", published, draft, VERIFIER, "--no-validate")
    assert speculators(*converting).status == 0
    run = speculators(
        "evaluate", draft, "--limit=1", "--max-new-tokens=24", "--acceptance-only",
        f"--num-draft-tokens={DRAFT_TOKENS}", "--output", report,
    )  # fmt: skip
    assert run.status == 0, run.stderr
    measured = Report.model_validate_json((report / "report.json").read_text())
    acceptance = measured.prompts[0].speculative[0].acceptance

    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER)
    ids = tokenizer.apply_chat_template(
        [message.model_dump() for message in read_prompts(OWN_PROMPTS)[0].messages],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    accepted = measure_drafts.accepted_by_step(
        measure_drafts.load(published), verifier, ids, 24, DRAFT_TOKENS, tokenizer.eos_token_id
    )
    assert (acceptance.steps, sum(acceptance.accepted)) == (len(accepted), sum(accepted))
    assert sum(accepted) > len(accepted) / 2
