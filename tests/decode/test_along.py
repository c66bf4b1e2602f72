"""Drafting along the verifier's own output counts what speculation accepts."""

import pytest
import torch
from transformers import GenerationConfig

from speculators.decode.along import draft_along
from speculators.decode.loop import speculate
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from tiny_models import knowing_draft, prompt, tiny_verifier

NEW_TOKENS = 24


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("method", ["greedy", "static_tree", "dynamic_tree"])
def test_it_counts_what_speculation_accepts(method: str, length: int) -> None:
    verifier = tiny_verifier()
    draft = knowing_draft(verifier)
    proposal = ProposalMethod(proposal_type=method)
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    ids = prompt(length)
    along = draft_along(draft, verifier, ids, proposal=proposal, generation=generation)
    real = speculate(draft, verifier, ids, proposal=proposal, generation=generation)
    assert torch.equal(along.sequences, real.sequences)
    assert along.accepted[0][:-1] == real.accepted[0][:-1]
    assert along.accepted[0][-1] <= real.accepted[0][-1]
    assert along.offered == real.offered
    assert sum(along.accepted[0]) > 0


def test_it_is_greedy_and_takes_one_prompt() -> None:
    verifier = tiny_verifier("llama")
    draft = knowing_draft(verifier)
    greedy = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    sampled = GenerationConfig(max_new_tokens=2, do_sample=True, pad_token_id=0)
    for ids, generation, method in (
        (prompt(4, rows=2), greedy, "greedy"),
        (prompt(4), sampled, "greedy"),
        (prompt(4), greedy, "sampling"),
    ):
        proposal = ProposalMethod(proposal_type=method)
        with pytest.raises(GenerationError, match="only greedily and one prompt at a time"):
            draft_along(draft, verifier, ids, proposal=proposal, generation=generation)
