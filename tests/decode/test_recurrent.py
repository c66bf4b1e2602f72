"""Drafting with a recurrent draft that reads several layers and has a vocabulary of its own."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distributions import SETTINGS, TOKENS, analytic, chi_square_is_likely, small_verifier
from plain_speculation import plain_chain, plain_dynamic_tree, plain_static_tree, plain_steps
from speculators.decode import Generation, speculate
from speculators.decode.tree import EAGLE1_TREE
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from tiny_models import prompt, tiny_verifier
from toy_draft import ToyDraft, plain_drafting

CHAIN = ProposalMethod(speculative_tokens=4)
SAMPLED = ProposalMethod(proposal_type="sampling", speculative_tokens=4)
STATIC_TREE = ProposalMethod(proposal_type="static_tree")
DYNAMIC_TREE = ProposalMethod(
    proposal_type="dynamic_tree", speculative_tokens=14, tree_depth=3, tree_top_k=4
)
PROPOSALS = {
    "chain": CHAIN,
    "sampled chain": SAMPLED,
    "static tree": STATIC_TREE,
    "dynamic tree": DYNAMIC_TREE,
}
every_proposal = pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS.keys())


@pytest.fixture(scope="module")
def verifier() -> PreTrainedModel:
    return tiny_verifier(num_hidden_layers=3, context=0.01)


@pytest.fixture(scope="module")
def draft(verifier: PreTrainedModel) -> ToyDraft:
    return ToyDraft(verifier)


def generated(
    draft: ToyDraft, verifier: PreTrainedModel, ids: Tensor, proposal: ProposalMethod, **more: Any
) -> Generation:
    settings = {"max_new_tokens": 20, "do_sample": False} | more
    torch.manual_seed(0)
    return speculate(draft, verifier, ids, proposal=proposal, **settings)


def own(verifier: Any, ids: Tensor, **more: Any) -> Tensor:
    tokens: Tensor = verifier.generate(ids, **({"max_new_tokens": 20, "do_sample": False} | more))
    return tokens


def batch(lengths: Sequence[int]) -> dict[str, Any]:
    """Prompts of these lengths, padded on the left."""
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = prompt(length, row)
        mask[row, -length:] = 1
    return {"ids": ids, "attention_mask": mask}


@every_proposal
def test_every_token_is_the_verifiers(
    verifier: PreTrainedModel, draft: ToyDraft, proposal: ProposalMethod
) -> None:
    for length in (1, 8):
        ids = prompt(length, seed=length)
        result = generated(draft, verifier, ids, proposal)
        assert torch.equal(result.sequences, own(verifier, ids))
        assert sum(result.accepted[0]) > (0 if proposal is SAMPLED else 3)


@pytest.mark.parametrize(
    ("proposal", "propose"),
    [
        (CHAIN, plain_chain(4)),
        (STATIC_TREE, plain_static_tree(EAGLE1_TREE)),
        (DYNAMIC_TREE, plain_dynamic_tree(nodes=14, depth=3, top_k=4)),
    ],
    ids=["chain", "static tree", "dynamic tree"],
)
def test_it_accepts_what_a_plain_evaluation_accepts(
    verifier: PreTrainedModel, draft: ToyDraft, proposal: ProposalMethod, propose: Any
) -> None:
    for seed in range(2):
        ids = prompt(6, seed)
        with torch.no_grad():
            expected = plain_steps(
                verifier,
                lambda tokens: plain_drafting(draft, verifier, tokens),
                ids[0].tolist(),
                20,
                propose,
            )
        result = generated(draft, verifier, ids, proposal)
        found = result.sequences[0].tolist(), result.accepted[0], result.offered[0]
        assert found == expected


@every_proposal
def test_a_batch_of_unequal_prompts(
    verifier: PreTrainedModel, draft: ToyDraft, proposal: ProposalMethod
) -> None:
    lengths = [5, 1, 9]
    inputs = batch(lengths)
    ends = own(verifier, **inputs)[[0, 2], [12, 20]].tolist()
    endings: list[dict[str, Any]] = [{}, {"eos_token_id": ends}]
    for more in endings:
        result = generated(draft, verifier, proposal=proposal, **inputs, **more)
        assert torch.equal(result.sequences, own(verifier, **inputs, **more))
        if proposal is SAMPLED:
            continue
        for row, length in enumerate(lengths):
            alone = generated(draft, verifier, prompt(length, row), proposal, **more)
            assert result.accepted[row] == alone.accepted[0]
            assert result.offered[row] == alone.offered[0]


@every_proposal
def test_each_hidden_state_is_projected_once_and_in_order(
    verifier: PreTrainedModel,
    draft: ToyDraft,
    proposal: ProposalMethod,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Tensor] = []
    project = draft.project

    def noted(verifier_states: Tensor) -> Tensor:
        given.append(verifier_states)
        return project(verifier_states)

    monkeypatch.setattr(draft, "project", noted)
    tokens = generated(draft, verifier, prompt(7), proposal).sequences
    states = torch.cat(given, 1)
    with torch.no_grad():
        hidden = verifier(tokens, output_hidden_states=True).hidden_states
    expected = torch.cat((hidden[2], hidden[1]), -1)[:, : states.shape[1]]
    assert states.shape[1] > 20
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


SMALL = {
    "chain": ProposalMethod(speculative_tokens=3),
    "sampled chain": ProposalMethod(proposal_type="sampling", speculative_tokens=3),
    "dynamic tree": ProposalMethod(
        proposal_type="dynamic_tree", speculative_tokens=7, tree_depth=2, tree_top_k=3
    ),
}


OFTEN = {(kind, "plain") for kind in SMALL} | {
    ("sampled chain", "repetition_penalty"),
    ("dynamic tree", "top_p"),
}


@pytest.mark.parametrize(
    ("proposal", "name"),
    [
        pytest.param(
            SMALL[kind],
            name,
            id=f"{kind}-{name}",
            marks=() if (kind, name) in OFTEN else pytest.mark.exhaustive,
        )
        for kind, name in itertools.product(SMALL, ["plain", "top_p", "repetition_penalty"])
    ],
)
def test_sequences_have_the_verifiers_distribution(proposal: ProposalMethod, name: str) -> None:
    """Each proposal without settings, and each setting with one of them; exhaustive: with all."""
    verifier, settings = small_verifier(), SETTINGS[name]
    draft = ToyDraft(verifier, tokens=[1, 2, 4])
    result = generated(
        draft,
        verifier,
        torch.tensor([[1, 3, 2]]),
        proposal,
        do_sample=True,
        max_new_tokens=TOKENS,
        num_return_sequences=1500,
        **settings,
    )
    counts = Counter(map(tuple, result.sequences[:, 3:].tolist()))
    expected = analytic(verifier, [1, 3, 2], settings)
    assert chi_square_is_likely(counts, expected)
    steps = [n for row in result.accepted for n in row]
    assert sum(steps) > len(steps) / 5


def test_a_tree_is_grown_from_the_drafts_vocabulary(verifier: PreTrainedModel) -> None:
    draft = ToyDraft(verifier, tokens=[1, 5, 40])
    with pytest.raises(
        GenerationError, match="tree_top_k 4 is more than the 3 tokens of the draft"
    ):
        generated(draft, verifier, prompt(4), DYNAMIC_TREE)
