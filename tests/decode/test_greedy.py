"""Greedy speculation generates what the verifier's own generate does, in fewer passes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from helpers import GOLDEN_NAMES, golden_vectors, tiny_llama
from pairwise import pairwise
from plain_speculation import (
    plain_chain,
    plain_dynamic_tree,
    plain_speculation,
    plain_static_tree,
)
from speculators.decode import Generation
from speculators.format.config import ProposalMethod
from speculators.models.eagle import EagleSpeculator
from tiny_models import VERIFIERS, knowing_draft, prompt, random_draft, tiny_verifier

SMALL_TREE = ProposalMethod(
    proposal_type="dynamic_tree", speculative_tokens=14, tree_depth=3, tree_top_k=4
)
PROPOSALS: dict[str, ProposalMethod | str] = {
    "greedy": "greedy",
    "one token": ProposalMethod(speculative_tokens=1),
    "sampling": "sampling",
    "static_tree": "static_tree",
    "dynamic_tree": "dynamic_tree",
    "small dynamic tree": SMALL_TREE,
}
every_proposal = pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS.keys())
SOME_PROPOSALS: dict[str, ProposalMethod | str] = {
    "chain": "greedy",
    "static tree": "static_tree",
    "dynamic tree": SMALL_TREE,
}
some_proposals = pytest.mark.parametrize(
    "proposal", SOME_PROPOSALS.values(), ids=SOME_PROPOSALS.keys()
)


def speculated(draft: EagleSpeculator, ids: Tensor, **settings: Any) -> Generation:
    result = draft.generate(ids, return_dict_in_generate=True, do_sample=False, **settings)
    assert isinstance(result, Generation)
    return result


def plain(verifier: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    sequences: Tensor = verifier.generate(ids, do_sample=False, **settings)  # type: ignore[operator]
    return sequences


@pytest.fixture(scope="module")
def verifier() -> PreTrainedModel:
    return tiny_verifier()


@pytest.fixture(scope="module")
def draft(verifier: PreTrainedModel) -> EagleSpeculator:
    return knowing_draft(verifier)


CASES: dict[str, tuple[Any, int, int]] = {
    "a token": (knowing_draft, 1, 12),
    "a prompt": (knowing_draft, 8, 32),
    "a draft that knows nothing": (partial(random_draft, layernorms=True), 4, 10),
}
"""A draft, the length of the prompt, and the number of tokens to generate."""


@pairwise(name=[*VERIFIERS], proposal=PROPOSALS, case=CASES)
def test_every_token_is_the_verifiers(
    name: str, proposal: ProposalMethod | str, case: tuple[Any, int, int]
) -> None:
    """Each verifier with each proposal, and both with each case; exhaustive: all three."""
    verifier = tiny_verifier(name)
    make, length, new = case
    ids = prompt(length, seed=length)
    result = speculated(make(verifier), ids, max_new_tokens=new, proposal=proposal)
    assert torch.equal(result.sequences, plain(verifier, ids, max_new_tokens=new))


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_draft_that_knows_its_verifier_saves_passes(name: str) -> None:
    verifier = tiny_verifier(name)
    steps = {
        proposal: len(
            speculated(
                knowing_draft(verifier), prompt(8), max_new_tokens=40, proposal=proposal
            ).accepted[0]
        )
        for proposal in ("greedy", "static_tree", "dynamic_tree")
    }
    assert steps["greedy"] < 39
    assert steps["static_tree"] <= steps["greedy"]
    assert steps["dynamic_tree"] < 27


@pytest.mark.parametrize(
    ("method", "propose"),
    [
        (ProposalMethod(speculative_tokens=1), plain_chain(1)),
        (ProposalMethod(speculative_tokens=4), plain_chain(4)),
        (
            ProposalMethod(proposal_type="static_tree"),
            plain_static_tree(
                [
                    tuple(map(int, path))
                    for path in (  # noqa: SIM905
                        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 "
                        "0000 0001 0002 00000 00001"
                    ).split()
                ]
            ),
        ),
        (SMALL_TREE, plain_dynamic_tree(nodes=14, depth=3, top_k=4)),
    ],
    ids=["one token", "chain", "static tree", "dynamic tree"],
)
@pytest.mark.parametrize("make", [knowing_draft, random_draft])
def test_it_accepts_what_a_plain_evaluation_accepts(
    method: ProposalMethod, propose: Any, make: Any
) -> None:
    verifier = tiny_verifier()
    draft = make(verifier)
    for seed in range(2):
        ids = prompt(6, seed)
        with torch.no_grad():
            expected = plain_speculation(draft, ids[0].tolist(), 20, propose)
        result = speculated(draft, ids, max_new_tokens=20, proposal=method)
        found = result.sequences[0].tolist(), result.accepted[0], result.offered[0]
        assert found == expected
        assert make is random_draft or sum(result.accepted[0]) > 2


# Ends


@every_proposal
def test_an_end_of_sequence_within_a_block(
    verifier: PreTrainedModel, draft: EagleSpeculator, proposal: ProposalMethod | str
) -> None:
    ids = prompt(6, seed=0)
    tokens = plain(verifier, ids, max_new_tokens=40)[0, 6:].tolist()
    ends = {tokens[i] for i in (0, 3, 7, 20)}
    for end in ends:
        expected = plain(verifier, ids, max_new_tokens=40, eos_token_id=end)
        result = speculated(draft, ids, max_new_tokens=40, eos_token_id=end, proposal=proposal)
        assert torch.equal(result.sequences, expected)
    both = {"eos_token_id": [*ends], "max_new_tokens": 40}
    result = speculated(draft, ids, proposal=proposal, **both)
    assert torch.equal(result.sequences, plain(verifier, ids, **both))


@some_proposals
def test_every_length_is_kept_to(
    verifier: PreTrainedModel, draft: EagleSpeculator, proposal: ProposalMethod | str
) -> None:
    ids = prompt(6, seed=0)
    expected = plain(verifier, ids, max_new_tokens=20)
    for length in (1, 2, 3, 5, 8, 13, 19):
        result = speculated(draft, ids, max_new_tokens=length, proposal=proposal)
        assert torch.equal(result.sequences, expected[:, : 6 + length])
    assert speculated(draft, ids, max_new_tokens=1, proposal=proposal).accepted == [[]]
    assert torch.equal(
        speculated(draft, ids, max_length=11, proposal=proposal).sequences, expected[:, :11]
    )


class EndsAt(StoppingCriteria):
    """A custom criterion: stop after two tokens whose sum is a multiple of 5."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -2:].sum(1) % 5 == 0


@every_proposal
def test_a_stopping_criterion_of_ones_own(
    verifier: PreTrainedModel, draft: EagleSpeculator, proposal: ProposalMethod | str
) -> None:
    lengths = set()
    for seed in range(4):
        settings = {"stopping_criteria": StoppingCriteriaList([EndsAt()]), "max_new_tokens": 40}
        expected = plain(verifier, prompt(6, seed), **settings)
        result = speculated(draft, prompt(6, seed), proposal=proposal, **settings)
        assert torch.equal(result.sequences, expected)
        lengths.add(expected.shape[1])
    assert len(lengths) > 1


class Heard(BaseStreamer):
    """A streamer that records what it receives."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.told.append(value.flatten().tolist())

    def end(self) -> None:
        self.told.append([-1])


@every_proposal
def test_a_streamer_hears_the_same(
    verifier: PreTrainedModel, draft: EagleSpeculator, proposal: ProposalMethod | str
) -> None:
    ids = prompt(6, seed=0)
    end = plain(verifier, ids, max_new_tokens=30)[0, -9].item()
    expected, found = Heard(), Heard()
    settings = {"max_new_tokens": 30, "eos_token_id": end}
    plain(verifier, ids, streamer=expected, **settings)
    speculated(draft, ids, streamer=found, proposal=proposal, **settings)
    assert found.told == expected.told
    assert len(found.told) > 4


# Batches


def batch(lengths: Sequence[int]) -> dict[str, Tensor]:
    """Prompts of these lengths, padded on the left."""
    longest = max(lengths)
    ids = torch.stack(
        [
            torch.cat((torch.zeros(longest - length, dtype=torch.long), prompt(length, seed)[0]))
            for seed, length in enumerate(lengths)
        ]
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pairwise(name=[*VERIFIERS], proposal=SOME_PROPOSALS, ending=[True, False])
def test_prompts_of_different_lengths_that_end_at_different_times(
    name: str, proposal: ProposalMethod | str, ending: bool
) -> None:
    """All pairs; exhaustive: each verifier with each proposal, ending and not."""
    verifier = tiny_verifier(name)
    draft = knowing_draft(verifier)
    inputs = batch([5, 1, 9, 4])
    ids = inputs.pop("input_ids")
    tokens = plain(verifier, ids, max_new_tokens=20, **inputs)[:, ids.shape[1] :]
    ends = [tokens[0, 3].item(), tokens[2, 11].item()]
    settings = {"eos_token_id": ends} if ending else {}
    expected = plain(verifier, ids, max_new_tokens=20, **inputs, **settings)
    result = speculated(draft, ids, max_new_tokens=20, proposal=proposal, **inputs, **settings)
    assert torch.equal(result.sequences, expected)
    assert len(result.accepted) == len(result.offered) == 4


@some_proposals
def test_each_prompt_of_a_batch_is_drafted_for_as_if_alone(
    draft: EagleSpeculator, proposal: ProposalMethod | str
) -> None:
    lengths = [5, 1, 9, 4]
    inputs = batch(lengths)
    together = speculated(
        draft, max_new_tokens=30, proposal=proposal, ids=inputs.pop("input_ids"), **inputs
    )
    for seed, length in enumerate(lengths):
        alone = speculated(draft, prompt(length, seed), max_new_tokens=30, proposal=proposal)
        assert together.accepted[seed] == alone.accepted[0]
        assert together.offered[seed] == alone.offered[0]
    assert len(set(map(len, together.accepted))) > 1


@every_proposal
def test_caches_grow(
    verifier: PreTrainedModel,
    draft: EagleSpeculator,
    proposal: ProposalMethod | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("speculators.decode.cache.MARGIN", 0)
    inputs = batch([2, 3])
    ids = inputs.pop("input_ids")
    expected = plain(verifier, ids, max_new_tokens=24, **inputs)
    result = speculated(draft, ids, max_new_tokens=24, proposal=proposal, **inputs)
    assert torch.equal(result.sequences, expected)


# Settings


PROCESSED: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": [*range(24)]},
    "suppress_tokens": {"suppress_tokens": [*range(0, 48, 2)]},
    "bad_words_ids": {"bad_words_ids": [[3], [5, 6], [40]], "eos_token_id": 1},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (4, 1.4),
        "eos_token_id": 9,
    },
}


@pytest.mark.parametrize("settings", PROCESSED.values(), ids=PROCESSED.keys())
@pytest.mark.parametrize(
    "proposal",
    [
        pytest.param(
            proposal,
            id=name,
            marks=pytest.mark.exhaustive if name in {"one token", "dynamic_tree"} else (),
        )
        for name, proposal in PROPOSALS.items()
    ],
)
def test_what_is_done_to_the_verifiers_logits(
    verifier: PreTrainedModel,
    draft: EagleSpeculator,
    settings: dict[str, Any],
    proposal: ProposalMethod | str,
) -> None:
    """Chains, drawn ones too, and trees; exhaustive: a shorter chain and a larger tree as well."""
    inputs = batch([7, 3])
    ids = inputs.pop("input_ids")
    expected = plain(verifier, ids, max_new_tokens=18, **inputs, **settings)
    assert not torch.equal(expected, plain(verifier, ids, max_new_tokens=18, **inputs))
    found = speculated(draft, ids, max_new_tokens=18, proposal=proposal, **inputs, **settings)
    assert torch.equal(found.sequences, expected)


def test_settings_may_come_in_a_generation_config(
    verifier: PreTrainedModel, draft: EagleSpeculator
) -> None:
    config = GenerationConfig(max_new_tokens=9, suppress_tokens=[4, 5, 6, 7], do_sample=False)
    ids = prompt(5)
    found = draft.generate(ids, generation_config=config)
    expected = verifier.generate(ids, generation_config=config)  # type: ignore[operator]
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    config.return_dict_in_generate = True
    assert isinstance(draft.generate(ids, generation_config=config), Generation)


def test_the_verifiers_defaults_are_kept_to() -> None:
    verifier = tiny_verifier()
    draft = knowing_draft(verifier)
    verifier.generation_config.max_new_tokens = 13
    verifier.generation_config.suppress_tokens = [*range(20)]
    ids = prompt(5)
    found = draft.generate(ids)
    assert isinstance(found, Tensor)
    assert torch.equal(found, verifier.generate(ids))  # type: ignore[operator]
    assert found.shape == (1, 18)


@some_proposals
def test_eager_attention(proposal: ProposalMethod | str) -> None:
    verifier = tiny_verifier("qwen2-sliding")
    verifier.set_attn_implementation("eager")
    draft = knowing_draft(verifier)
    inputs = batch([7, 3])
    ids = inputs.pop("input_ids")
    expected = plain(verifier, ids, max_new_tokens=24, **inputs)
    found = speculated(draft, ids, max_new_tokens=24, proposal=proposal, **inputs)
    assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@some_proposals
def test_dtypes_may_differ(
    dtypes: tuple[torch.dtype, torch.dtype], proposal: ProposalMethod | str
) -> None:
    """Rounding differs with the shape of a matrix, so tokens are not compared with plain decoding:
    each must be the verifier's choice after the tokens before it, within rounding."""
    verifier = tiny_verifier()
    draft = knowing_draft(verifier)
    draft.to(dtypes[0])  # type: ignore[arg-type]
    verifier.to(dtypes[1])  # type: ignore[arg-type]
    inputs = batch([7, 3])
    ids = inputs.pop("input_ids")
    result = speculated(draft, ids, max_new_tokens=24, proposal=proposal, **inputs)
    assert sum(map(sum, result.accepted)) > 10
    for row, pad in zip(result.sequences, (0, 4), strict=True):
        logits = verifier(row[None, pad:]).logits[0, 6 - pad : -1].float()
        chosen = logits.gather(1, row[7:, None])[:, 0]
        tolerance = torch.finfo(dtypes[1]).eps * 8 * logits.abs().max()
        assert (logits.max(1).values - chosen <= tolerance).all()


def test_nothing_is_left_behind(verifier: PreTrainedModel, draft: EagleSpeculator) -> None:
    class Broken(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.ndim == 1:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        speculated(draft, prompt(5), max_new_tokens=5, streamer=Broken())
    assert not verifier.base_model._forward_hooks
    speculated(draft, prompt(5), max_new_tokens=5)
    assert not verifier.base_model._forward_hooks
    assert draft.logits(torch.zeros(1, 1, 32)).shape == (1, 1, 48)


# The reference's tree


@pytest.mark.parametrize("name", [n for n in GOLDEN_NAMES if n != "ttt_layernorms"])
def test_the_dynamic_tree_is_the_references(converted: dict[str, Any], name: str) -> None:
    """The golden tree has ``total_tokens=26`` (which counts the root), ``depth=5, top_k=4``."""
    from speculators.decode.cache import BlockCache
    from speculators.decode.proposals import drafter_of
    from speculators.decode.sampling import warp_of

    g = golden_vectors(name)
    draft = EagleSpeculator.from_pretrained(
        converted[name], verifier=tiny_llama(g["lm_head.weight"])
    )
    method = ProposalMethod(
        proposal_type="dynamic_tree", speculative_tokens=25, tree_depth=5, tree_top_k=4
    )
    drafter = drafter_of(draft, BlockCache([0]), method, warp_of(LogitsProcessorList()))
    with torch.no_grad():
        tree = drafter.propose(g["tree_input_ids"][:, 1:], g["tree_hidden_states"], [16])

    assert torch.equal(tree.tokens, g["tree_draft_tokens"])
    assert torch.equal(tree.depths[0], g["tree_position_ids"])
    assert torch.equal(tree.ancestors[None].float(), g["tree_mask"].float())
    above = tree.parents[0].tolist()
    leaves = [node for node in range(26) if node not in above]
    rows = g["tree_retrieve_indices"]
    assert len(leaves) == len(rows)
    for leaf, row in zip(leaves, rows.tolist(), strict=True):
        path = [leaf]
        while path[0]:
            path.insert(0, above[path[0]])
        assert path + [-1] * (len(row) - len(path)) == row
