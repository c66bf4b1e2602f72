"""Sampled speculation has the verifier's distribution, whatever the draft proposes."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EtaLogitsWarper,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from distributions import SETTINGS, TOKENS, analytic, chi_square_is_likely, small_verifier
from speculators.decode.sampling import coupled_draw, draw, warp_of
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from speculators.models.eagle import EagleSpeculator
from tiny_models import knowing_draft, random_draft, tiny_verifier

PROPOSALS = {
    "greedy": ProposalMethod(speculative_tokens=3),
    "sampling": ProposalMethod(proposal_type="sampling", speculative_tokens=3),
    "static_tree": ProposalMethod(proposal_type="static_tree"),
    "dynamic_tree": ProposalMethod(
        proposal_type="dynamic_tree", speculative_tokens=7, tree_depth=2, tree_top_k=3
    ),
}


@pytest.fixture(scope="module")
def verifier() -> PreTrainedModel:
    return small_verifier()


def sampled(
    draft: EagleSpeculator,
    prompt: list[int],
    proposal: ProposalMethod,
    draws: int,
    settings: dict[str, Any],
) -> tuple[Counter[tuple[int, ...]], list[int]]:
    torch.manual_seed(0)
    result = draft.generate(
        torch.tensor([prompt]),
        proposal=proposal,
        do_sample=True,
        max_new_tokens=TOKENS,
        num_return_sequences=draws,
        return_dict_in_generate=True,
        **settings,
    )
    assert not isinstance(result, Tensor)
    tails = result.sequences[:, len(prompt) :].tolist()
    return Counter(map(tuple, tails)), [n for steps in result.accepted for n in steps]


SOME = {
    *itertools.product(PROPOSALS, ["plain"]),
    *zip(PROPOSALS, [name for name in SETTINGS if name != "plain"], strict=True),
}


@pytest.mark.parametrize(
    ("proposal", "settings"),
    [
        pytest.param(
            PROPOSALS[proposal],
            SETTINGS[settings],
            id=f"{proposal}-{settings}",
            marks=() if (proposal, settings) in SOME else pytest.mark.exhaustive,
        )
        for proposal, settings in itertools.product(PROPOSALS, SETTINGS)
    ],
)
def test_sequences_have_the_verifiers_distribution(
    verifier: PreTrainedModel, proposal: ProposalMethod, settings: dict[str, Any]
) -> None:
    """Each proposal without settings, and each setting with one of them; exhaustive: with all."""
    prompt = [1, 3, 2]
    counts, accepted = sampled(knowing_draft(verifier), prompt, proposal, 1500, settings)
    expected = analytic(verifier, prompt, settings)
    assert sum(expected.values()) == pytest.approx(1)
    assert chi_square_is_likely(counts, expected)
    assert sum(accepted) > len(accepted) / 5


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            settings, id=name, marks=() if name in {"plain", "top_p"} else pytest.mark.exhaustive
        )
        for name, settings in SETTINGS.items()
    ],
)
def test_a_proposal_that_is_drawn_from_some_tokens_only_changes_nothing(
    verifier: PreTrainedModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without other tokens left out by a setting; exhaustive: with every setting."""
    monkeypatch.setattr("speculators.decode.drawing.CANDIDATES", 2)
    prompt = [1, 3, 2]
    draft = knowing_draft(verifier)
    counts, accepted = sampled(draft, prompt, PROPOSALS["sampling"], 1500, settings)
    assert chi_square_is_likely(counts, analytic(verifier, prompt, settings))
    assert sum(accepted) > len(accepted) / 5


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS.keys())
def test_a_draft_that_is_wrong_changes_nothing(
    verifier: PreTrainedModel, proposal: ProposalMethod
) -> None:
    counts, _ = sampled(random_draft(verifier), [4], proposal, 1500, SETTINGS["plain"])
    assert chi_square_is_likely(counts, analytic(verifier, [4], SETTINGS["plain"]))


def test_the_test_would_see_another_distribution(verifier: PreTrainedModel) -> None:
    draft, proposal = knowing_draft(verifier), PROPOSALS["sampling"]
    counts, _ = sampled(draft, [1, 3, 2], proposal, 4000, {"top_k": 0, "temperature": 1.15})
    assert not chi_square_is_likely(counts, analytic(verifier, [1, 3, 2], SETTINGS["plain"]))


def test_one_prompt_at_a_time_too(verifier: PreTrainedModel) -> None:
    """A batch of one takes other code paths through the cache than a larger one."""
    draft = knowing_draft(verifier)
    torch.manual_seed(0)
    for name in ("sampling", "dynamic_tree"):
        counts: Counter[tuple[int, ...]] = Counter()
        for _ in range(120):
            ids = draft.generate(
                torch.tensor([[1, 3, 2]]),
                proposal=PROPOSALS[name],
                do_sample=True,
                top_k=0,
                max_new_tokens=TOKENS,
            )
            assert isinstance(ids, Tensor)
            counts[tuple(ids[0, 3:].tolist())] += 1
        assert chi_square_is_likely(counts, analytic(verifier, [1, 3, 2], SETTINGS["plain"]))


def test_each_row_is_drawn_from_its_distribution() -> None:
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0], [1e-3, 1e-2, 0.1, 0.889]])
    drawn = draw(p.repeat(20_000, 1)).view(-1, 3)
    for row, tokens in zip(p.tolist(), drawn.T.tolist(), strict=True):
        if max(row) == 1:
            assert set(tokens) == {row.index(1)}
        else:
            assert chi_square_is_likely(Counter(tokens), {t: x for t, x in enumerate(row) if x})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the host waits for a GPU only")
def test_the_host_does_not_wait_for_a_draw() -> None:
    p, q = torch.rand(2, 50, device="cuda").softmax(-1)
    proposed = draw(q)
    torch.cuda.set_sync_debug_mode("error")
    try:
        coupled_draw(p, q, proposed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_coupled_draw_has_the_first_distribution_and_is_equal_as_often_as_can_be() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.2, 0.0, 0.3])
    q = torch.tensor([0.2, 0.3, 0.4, 0.1])
    proposed = q.multinomial(20_000, replacement=True)
    drawn = torch.cat([coupled_draw(p, q, token[None]) for token in proposed])
    expected = {token: value for token, value in enumerate(p.tolist()) if value}
    assert chi_square_is_likely(Counter(drawn.tolist()), expected)
    equal = float((drawn == proposed).double().mean())
    assert equal == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.01)


def test_a_coupled_draw_from_equal_distributions_is_the_proposal() -> None:
    p = torch.rand(50).softmax(0)
    assert all(coupled_draw(p, p.clone(), torch.tensor([i])).tolist() == [i] for i in range(50))


def test_the_same_seed_gives_the_same_tokens(verifier: PreTrainedModel) -> None:
    draft = knowing_draft(verifier)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(draft.generate(torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=20))
    assert torch.equal(found[0], found[1])  # type: ignore[arg-type]


def test_warps_are_equal_if_they_do_the_same() -> None:
    def warp(temperature: float = 0.7, top_k: int = 9, eta: float = 1e-3) -> Any:
        warpers = (
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            EtaLogitsWarper(eta),  # holds a tensor
        )
        return warp_of(LogitsProcessorList([*warpers, RepetitionPenaltyLogitsProcessor(1.5)]))

    assert warp() == warp()
    assert hash(warp()) == hash(warp())
    others = [warp(temperature=0.70000001), warp(top_k=8), warp(eta=1.00001e-3)]
    assert len({warp(), *others, warp_of(LogitsProcessorList())}) == 5
    both = TemperatureLogitsWarper(0.7), TopKLogitsWarper(9)
    assert warp_of(LogitsProcessorList(both)) != warp_of(LogitsProcessorList(both[::-1]))


class Alternating(TemperatureLogitsWarper):
    """Allow odd tokens only after even ones, and even ones only after odd ones."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        parity = input_ids[:, -1:] % 2
        tokens = torch.arange(scores.shape[1])
        scores = super().__call__(input_ids, scores)
        return scores.masked_fill(tokens % 2 == parity, -torch.inf)


def test_a_warper_of_ones_own_is_given_the_tokens_before(verifier: PreTrainedModel) -> None:
    ids = knowing_draft(verifier).generate(
        torch.tensor([[1, 2]]),
        proposal=PROPOSALS["sampling"],
        logits_processor=LogitsProcessorList([Alternating(0.9)]),
        do_sample=True,
        max_new_tokens=20,
    )
    assert isinstance(ids, Tensor)
    assert all((a - b) % 2 for a, b in itertools.pairwise(ids[0].tolist()))


@pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS.keys())
def test_logits_that_are_no_numbers_are_told(proposal: ProposalMethod) -> None:
    verifier = tiny_verifier()
    draft = knowing_draft(verifier)
    verifier.get_output_embeddings().weight.data[0] = torch.nan
    with pytest.raises(GenerationError, match="logits are not numbers"):
        draft.generate(torch.tensor([[1, 2]]), proposal=proposal, do_sample=True, max_new_tokens=9)
