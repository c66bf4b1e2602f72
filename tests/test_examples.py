"""The real drafts in examples/ and their real verifier: they draft what it generates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from helpers import CommandLine
from speculators.convert.conversion import convert
from speculators.models import load_draft
from speculators.models.dflash import DFlashSpeculator

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""``make test`` creates this before the tests run."""

DRAFTS = sorted(path.parent.name for path in EXAMPLES.glob("*/config.json"))

OPTIONS = {"smollm2-135m-eagle31": {"norm_output": "feedback"}}
"""What a user has to say about a draft to convert it."""

Answers = list[tuple[Tensor, tuple[Tensor, ...]]]
"""The ids of conversations, and the verifier's states at them, by layer."""

RECORDED = Path(__file__).parent / "recorded" / "smollm2_answers.json"
"""Prompts, and the tokens of the verifier's greedy answers: 64, unless it ends before."""


@pytest.fixture(scope="module")
def verifier() -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def asked() -> list[Tensor]:
    """The prompts, as tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": recorded["prompt"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        for recorded in json.loads(RECORDED.read_text())
    ]


@pytest.fixture(scope="module")
def answers(verifier: Any, asked: list[Tensor]) -> Answers:
    """Ids and all hidden states of the whole conversations."""
    conversations = []
    for ids, recorded in zip(asked, json.loads(RECORDED.read_text()), strict=True):
        whole = torch.cat((ids, torch.tensor([recorded["answer"]])), 1)
        with torch.inference_mode():
            found = verifier(whole, output_hidden_states=True)
        # One pass over all of them shows that each token is the one the verifier gives there.
        assert torch.equal(
            found.logits[0, ids.shape[1] - 1 : -1].argmax(-1), whole[0, ids.shape[1] :]
        )
        conversations.append((whole, found.hidden_states))
    return conversations


@pytest.mark.exhaustive
def test_what_is_recorded_is_what_the_verifier_generates(
    verifier: Any, asked: list[Tensor]
) -> None:
    for ids, recorded in zip(asked, json.loads(RECORDED.read_text()), strict=True):
        generated = verifier.generate(ids, max_new_tokens=64, do_sample=False)
        assert generated[0, ids.shape[1] :].tolist() == recorded["answer"]


@pytest.fixture(scope="module", params=DRAFTS)
def draft(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    verifier: PreTrainedModel,
) -> Any:
    """A draft of the examples, converted with validation."""
    output, name = tmp_path_factory.mktemp("converted") / request.param, request.param
    convert(EXAMPLES / name, output, VERIFIER, options=OPTIONS.get(name))
    return load_draft(output, dtype=torch.float32, verifier=verifier)


def agreement(draft: Any, answers: Answers, shift: int) -> float:
    """The share of the last 60 tokens that the draft guesses, with tokens shifted by ``shift``."""
    guess = guessed_in_blocks if isinstance(draft, DFlashSpeculator) else guessed
    right = []
    for ids, states in answers:
        read = torch.cat([states[layer] for layer in draft.verifier_layers or (-1,)], -1)
        right.append(guess(draft, ids, read, shift))
    return torch.cat(right).float().mean().item()


def guessed(draft: Any, ids: Tensor, read: Tensor, shift: int) -> Tensor:
    """Whether the last 60 tokens are guessed, each from all before it."""
    length = ids.shape[1] - 2
    logits = draft(input_ids=ids[:, shift : shift + length], hidden_states=read[:, :length]).logits
    guesses: Tensor = draft.to_verifier(logits.argmax(-1))
    return (guesses == ids[:, 2:])[0, -60:]


def guessed_in_blocks(draft: Any, ids: Tensor, read: Tensor, shift: int) -> Tensor:
    """Whether the first two tokens of blocks are guessed, for the last 60 tokens."""
    right = []
    for anchor in range(ids.shape[1] - 61, ids.shape[1] - 2, 2):
        block = torch.full((1, draft.block_size), draft.mask_token_id)
        block[0, 0] = ids[0, anchor - 1 + shift]
        logits = draft(input_ids=block, hidden_states=read[:, :anchor]).logits
        right.append(logits[0, :2].argmax(-1) == ids[0, anchor + 1 : anchor + 3])
    return torch.cat(right)


def test_there_are_drafts_of_several_families() -> None:
    published = ("eagle1", "hass", "layernorms", "eagle3")
    assert {f"smollm2-135m-{name}" for name in published} <= set(DRAFTS)


def test_a_draft_guesses_what_its_verifier_says(draft: Any, answers: Answers) -> None:
    """Trained drafts guess many tokens, but few if tokens and hidden states are misaligned."""
    right = agreement(draft, answers, shift=1)
    assert right > (0.3 if isinstance(draft, DFlashSpeculator) else 0.4)
    assert agreement(draft, answers, shift=0) < right / 2


def test_the_published_draft_brings_no_embedding(tmp_path: Path, speculators: CommandLine) -> None:
    """Like many EAGLE-1 checkpoints, it has nine tensors, and uses the verifier's embedding."""
    run = speculators(
        "convert", "eagle", EXAMPLES / "smollm2-135m-eagle1", tmp_path / "out", VERIFIER
    )
    assert run.status == 0
    assert run.messages == [
        f"Converting Eagle checkpoint: {EXAMPLES / 'smollm2-135m-eagle1'}",
        "Loaded 9 weights",
        "Validating converted checkpoint...",
        "Model loaded successfully",
        "Forward pass successful",
        f"Saved to: {tmp_path / 'out'}",
    ]
