"""The training of the examples' DFlash draft: what learns is what the converted draft computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dflash import TARGET
from speculators.convert.conversion import convert
from speculators.models import load_draft
from training.conversations import DEEPEST, LIKELIEST, Conversations
from training.dflash import ANCHORS, FADING, DFlashDraft, layers_read
from training.publishing import dflash_config, publish
from training.recipes import RECIPES

MASK, BLOCK = 319, 8


@pytest.fixture(scope="module")
def verifier() -> Any:
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)


@pytest.fixture(scope="module")
def conversations(verifier: Any) -> Conversations:
    """Two conversations, with the verifier's states and its likeliest tokens at each place."""
    torch.manual_seed(0)
    ids, reads = torch.randint(0, 300, (2, 24)), layers_read(verifier, 3)
    with torch.inference_mode():
        states = verifier.model(ids, output_hidden_states=True).hidden_states
        scores, tokens = verifier.lm_head(states[-1]).topk(LIKELIEST)
    return Conversations(
        reads,
        ids,
        begin=torch.tensor([5, 8]),
        size=torch.tensor([15, 6]),
        states=torch.cat([states[layer] for layer in reads], -1).clone(),
        tokens=tokens.int(),
        shares=scores.softmax(-1),
    )


@pytest.fixture(scope="module")
def draft(verifier: Any, conversations: Conversations) -> DFlashDraft:
    """A draft before its training, all of whose weights are such as bfloat16 has."""
    reads = conversations.layers
    draft = DFlashDraft(dflash_config(verifier, RECIPES["dflash"], reads, MASK), reads)
    torch.manual_seed(1)
    for parameter in draft.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
        parameter.data = parameter.bfloat16().float()
    return draft


@torch.no_grad()
def test_blocks_of_one_pass_are_what_the_converted_draft_computes_one_by_one(
    draft: DFlashDraft, verifier: Any, conversations: Conversations, tmp_path: Path
) -> None:
    """Each block sees the verifier's states before its anchor, and itself, in both directions."""
    publish(tmp_path / "published", draft, RECIPES["dflash"])
    output = convert(tmp_path / "published", tmp_path / "converted", TARGET)
    converted = load_draft(output, dtype=torch.float32, verifier=verifier)
    assert type(converted).__name__ == "DFlashSpeculator"
    assert converted.verifier_layers == conversations.layers

    anchors = torch.tensor([[5, 9, 6, 19], [8, 8, 11, 12]])
    tokens, embed = conversations.ids.gather(1, anchors), verifier.get_input_embeddings()
    at_once = draft(embed, conversations.states, tokens, anchors, BLOCK)
    for row, columns in enumerate(anchors.tolist()):
        for nth, column in enumerate(columns):
            alone = converted(
                torch.tensor([[int(tokens[row, nth]), *[MASK] * (BLOCK - 1)]]),
                conversations.states[row : row + 1, :column],
            ).last_hidden_state
            torch.testing.assert_close(at_once[row, nth], alone[0], rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_cross_entropy_at_the_places_of_an_answer(
    draft: DFlashDraft, verifier: Any, conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed again with one block at a time, and its gradient by autograd."""
    embed, head = verifier.get_input_embeddings(), verifier.lm_head.weight.detach()
    drawn = torch.rand(2, ANCHORS)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)
    loss = draft.loss(embed, head, conversations, 21)
    (gradient,) = torch.autograd.grad(loss, draft.norm.weight)

    total, weights = torch.zeros(()), 0.0
    for row, (begin, size) in enumerate(((5, 15), (8, 6))):
        for share in drawn[row, :].tolist():
            anchor = begin + int(share * (size - 1))
            assert begin <= anchor < begin + size - 1
            one = conversations.take(torch.tensor([row]), anchor)
            x = draft(
                embed, one.states, conversations.ids[row : row + 1, anchor, None],
                torch.tensor([[anchor]]), BLOCK,
            )[0, 0]  # fmt: skip
            for nth in range(min(BLOCK - 1, begin + size - 1 - anchor)):
                weight = float(torch.tensor(-nth / FADING).exp())
                before = anchor + nth
                scores = (head @ x[nth + 1]).log_softmax(-1)
                likely = scores[conversations.tokens[row, before].long()]
                total = total - weight * (conversations.shares[row, before] * likely).sum()
                weights += weight
    torch.testing.assert_close(loss, total / weights, rtol=1e-4, atol=1e-4)
    (expected,) = torch.autograd.grad(total / weights, draft.norm.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_acceptance_is_counted_as_in_decoding(
    draft: DFlashDraft, verifier: Any, conversations: Conversations
) -> None:
    """A block begins where the tokens accepted before, and the verifier's own, have ended."""
    embed, head = verifier.get_input_embeddings(), verifier.lm_head.weight.detach()
    said = conversations.tokens.clone()
    accepted = [[2, 0, 3, 6], [1, 0, 0, 0]]  # the last of the first is as long as the answer
    for row, (at, steps) in enumerate(zip(conversations.begin.tolist(), accepted, strict=True)):
        for right in steps:
            one = conversations.take(torch.tensor([row]), at)
            anchor = conversations.ids[row : row + 1, at, None]
            x = draft(embed, one.states, anchor, torch.tensor([[at]]), BLOCK)
            drafted = (x[0, 0, 1:] @ head.T).argmax(-1)
            said[row, at : at + right, 0] = drafted[:right].int()
            if right < BLOCK - 2:
                said[row, at + right, 0] = (int(drafted[right]) + 1) % 320
            at += right + 1  # noqa: PLW2901
    measured = draft.measured(embed, head, [replace(conversations, tokens=said)])
    assert measured["acceptance_length"] == 1 + 12 / 8


def test_groups_by_length_keep_all_that_is_learned_from(conversations: Conversations) -> None:
    shorter, longer = conversations.by_length(2)
    assert [part.ids.shape[1] for part in (shorter, longer)] == [8 + 6 + DEEPEST, 5 + 15 + DEEPEST]
    for part, row in ((longer, 0), (shorter, 1)):
        end = int(part.begin + part.size)
        for name in ("ids", "states", "tokens", "shares"):
            kept, whole = getattr(part, name)[0, :end], getattr(conversations, name)[row, :end]
            assert torch.equal(kept, whole)
        last, first = conversations.layers[-1], conversations.layers[0]
        read = part.read((last, first)).chunk(2, -1)
        states = part.states.chunk(len(conversations.layers), -1)
        assert torch.equal(read[0], states[-1])
        assert torch.equal(read[1], states[0])
