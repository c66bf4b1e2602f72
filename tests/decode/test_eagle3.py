"""Drafting and generating with EAGLE-3, EAGLE-3.1 and P-EAGLE drafts."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel

from distributions import SETTINGS, TOKENS, analytic, chi_square_is_likely, small_verifier
from eagle3 import (
    NAMES,
    PARALLEL,
    TARGET,
    TREES,
    golden3,
    knowing_eagle3,
    narrow_verifier,
    plain_drafting,
)
from plain_speculation import plain_chain, plain_dynamic_tree, plain_steps
from speculators.decode import Generation
from speculators.decode.cache import BlockCache
from speculators.decode.drafter import Drafter
from speculators.decode.proposals import drafter_of
from speculators.decode.sampling import warp_of
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from speculators.models import load_draft
from speculators.models.eagle3 import Eagle3Speculator, PEagleSpeculator
from tiny_models import prompt, tiny_verifier

CHAIN = ProposalMethod(speculative_tokens=4)
SAMPLED = ProposalMethod(proposal_type="sampling", speculative_tokens=4)
TREE = ProposalMethod(
    proposal_type="dynamic_tree", speculative_tokens=14, tree_depth=3, tree_top_k=4
)
GOLDEN_TREE = ProposalMethod(  # 20 nodes, the root among them
    proposal_type="dynamic_tree", speculative_tokens=19, tree_depth=4, tree_top_k=4
)
STATIC_TREE = ProposalMethod(proposal_type="static_tree")


def drafter(draft: Any, method: ProposalMethod, padding: list[int] | None = None) -> Drafter:
    return drafter_of(draft, BlockCache(padding or [0]), method, warp_of(LogitsProcessorList()))


def left(rows: Tensor, padding: int) -> Tensor:
    """Rows with so many positions of padding at the left."""
    return torch.cat((rows.new_ones(len(rows), padding, *rows.shape[2:]), rows), 1)


@pytest.mark.parametrize("name", TREES)
@torch.inference_mode()
def test_its_trees_are_the_references(eagle3_drafts: dict[str, Path], name: str) -> None:
    """Both rounds: also in a batch, beside a row that is longer and accepts fewer tokens.

    ``target_hidden_48`` has no second round, since no verifier of its width was there.
    """
    g, draft = golden3(name), load_draft(eagle3_drafts[name], dtype="float32")
    ids, states = g["input_ids"], g["aux_hidden"]
    rounds = 1 if name == "target_hidden_48" else 2
    longer = torch.arange(20, 36)[None], torch.randn(1, 15, states.shape[2])

    def check(tree: Any, golden: str) -> None:
        assert torch.equal(tree.tokens[:1], g[f"{golden}_draft_tokens"])
        assert torch.equal(tree.ancestors[0].float(), g[f"{golden}_tree_mask"][0, 0])
        assert torch.equal(tree.depths[0], g[f"{golden}_tree_position_ids"])

    alone = drafter(draft, GOLDEN_TREE)
    alone.prefill(ids[:, 1:12], states[:, :11])
    check(alone.propose(ids[:, 12:13], states[:, 11:12], [1]), "tree")
    if rounds == 2:
        check(alone.propose(g["tree2_input_ids"][:, 13:], g["tree2_aux_hidden"], [3]), "tree2")

    batch = drafter(draft, GOLDEN_TREE, [3, 0])
    tokens = torch.cat((left(ids, 3), longer[0]))
    both = torch.cat((left(states, 3), longer[1]))
    batch.prefill(tokens[:, 1:15], both[:, :14])
    check(batch.propose(tokens[:, 15:16], both[:, 14:15], [1, 1]), "tree")
    if rounds == 2:
        confirmed = g["tree2_input_ids"][:, 13:].expand(2, -1)
        check(batch.propose(confirmed, g["tree2_aux_hidden"].expand(2, -1, -1), [3, 1]), "tree2")


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_its_chains_are_golden(eagle3_drafts: dict[str, Path], name: str) -> None:
    g, draft = golden3(name), load_draft(eagle3_drafts[name], dtype="float32")
    ids, states = g["input_ids"], g["aux_hidden"]
    expected = g["parallel_target_ids" if name == PARALLEL else "chain_target_ids"]
    for known in (11, 8):  # the draft has seen all but one of the tokens, or but four
        alone = drafter(draft, CHAIN, [2])
        alone.prefill(left(ids[:, 1 : 1 + known], 2), left(states[:, :known], 2))
        tree = alone.propose(ids[:, 1 + known :], states[:, known:], [12 - known])
        assert tree.is_chain
        assert torch.equal(tree.tokens[0, 1:], expected)
    # Beside a row with more tokens that the draft has not seen.
    both = drafter(draft, CHAIN, [0, 0])
    both.prefill(ids[:, 1:12].expand(2, -1), states[:, :11].expand(2, -1, -1))
    unseen = torch.tensor([[int(ids[0, 12]), 0, 0, 0], [5, 6, 7, 8]])
    tree = both.propose(unseen, states[:, 8:].expand(2, -1, -1).roll(1, 1), [1, 4])
    assert torch.equal(tree.tokens[0, 1:], expected)


def generated(draft: Any, ids: Tensor, **settings: Any) -> Generation:
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": 24} | settings
    result = draft.generate(ids, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    return result


def own(verifier: Any, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": 24} | settings
    tokens: Tensor = verifier.generate(ids, **settings)
    return tokens


def batch(lengths: list[int], vocabulary: int) -> dict[str, Tensor]:
    """Prompts of these lengths, padded at the left."""
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    generator = torch.Generator().manual_seed(3)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, vocabulary, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", NAMES)
def test_golden_drafts_generate_what_their_verifier_does(
    eagle3_drafts: dict[str, Path], name: str
) -> None:
    draft = load_draft(eagle3_drafts[name], dtype="float32")
    if name == "target_hidden_48":
        verifier = narrow_verifier(48)
    else:
        verifier = AutoModelForCausalLM.from_pretrained(TARGET, dtype="float32")
    draft.attach_verifier(verifier)
    inputs: dict[str, Any] = batch([5, 1, 9], 320)
    inputs |= {"max_new_tokens": 10, "pad_token_id": 0}
    expected = own(verifier, **inputs)
    for proposal in (CHAIN, SAMPLED, TREE):
        if name == PARALLEL and proposal is TREE:
            continue
        assert torch.equal(generated(draft, proposal=proposal, **inputs).sequences, expected)


@pytest.fixture(scope="module")
def verifier() -> PreTrainedModel:
    return tiny_verifier(num_hidden_layers=3, context=0.003)


@pytest.fixture(scope="module", params=["eagle3", "eagle31", "parallel"])
def draft(request: pytest.FixtureRequest, verifier: PreTrainedModel) -> Eagle3Speculator:
    kinds: dict[str, dict[str, Any]] = {
        "eagle3": {},
        "eagle31": {"fc_norm": True, "norm_output": True},
        "parallel": {"parallel": True},
    }
    return knowing_eagle3(verifier, **kinds[request.param])


def methods(draft: Eagle3Speculator) -> list[ProposalMethod]:
    return [CHAIN, SAMPLED] if draft.config.parallel else [CHAIN, SAMPLED, STATIC_TREE, TREE]


def test_it_is_often_right(verifier: PreTrainedModel, draft: Eagle3Speculator) -> None:
    for proposal in methods(draft):
        ids = prompt(8, seed=8)
        result = generated(draft, ids, proposal=proposal)
        assert torch.equal(result.sequences, own(verifier, ids))
        assert sum(result.accepted[0]) > (0 if proposal is SAMPLED else 5)


def test_it_accepts_what_a_plain_evaluation_accepts(
    verifier: PreTrainedModel, draft: Eagle3Speculator
) -> None:
    plain = [(CHAIN, plain_chain(4)), (TREE, plain_dynamic_tree(nodes=14, depth=3, top_k=4))]
    for proposal, propose in plain[: 1 if draft.config.parallel else 2]:
        for seed in range(2):
            ids = prompt(6, seed)
            with torch.no_grad():
                expected = plain_steps(
                    verifier,
                    lambda tokens: plain_drafting(draft, verifier, tokens),
                    ids[0].tolist(),
                    16,
                    propose,
                )
            result = generated(draft, ids, proposal=proposal, max_new_tokens=16)
            found = result.sequences[0].tolist(), result.accepted[0], result.offered[0]
            assert found == expected


def test_rows_of_a_batch_draft_as_if_alone(
    verifier: PreTrainedModel, draft: Eagle3Speculator
) -> None:
    lengths = [5, 1, 9]
    inputs = batch(lengths, 48)
    ends = own(verifier, **inputs)[[0, 2], [12, 20]].tolist()
    for proposal in methods(draft):
        more = {"eos_token_id": ends} if proposal in (CHAIN, TREE) else {"max_new_tokens": 14}
        result = generated(draft, proposal=proposal, **inputs, **more)
        assert torch.equal(result.sequences, own(verifier, **inputs, **more))
        if proposal is SAMPLED:
            continue
        for row, length in enumerate(lengths):
            ids = inputs["ids"][row : row + 1, -length:]
            alone = generated(draft, ids, proposal=proposal, **more)
            assert result.accepted[row] == alone.accepted[0]
            assert result.offered[row] == alone.offered[0]


@pytest.mark.parametrize(
    ("proposal", "name"),
    [
        ("sampling", "plain"),
        ("greedy", "plain"),
        ("sampling", "top_p"),
        pytest.param("greedy", "top_p", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("parallel", [False, True], ids=["eagle3", "parallel"])
def test_sequences_have_the_verifiers_distribution(
    name: str, proposal: str, parallel: bool
) -> None:
    verifier, settings = small_verifier(), SETTINGS[name]
    draft = knowing_eagle3(verifier, tokens=[1, 2, 4], layers=(0, 1), parallel=parallel)
    result = generated(
        draft,
        torch.tensor([[1, 3, 2]]),
        proposal=ProposalMethod(proposal_type=proposal, speculative_tokens=3),
        do_sample=True,
        max_new_tokens=TOKENS,
        num_return_sequences=1500,
        **settings,
    )
    counts = Counter(map(tuple, result.sequences[:, 3:].tolist()))
    assert chi_square_is_likely(counts, analytic(verifier, [1, 3, 2], settings))
    steps = [n for row in result.accepted for n in row]
    assert sum(steps) > len(steps) / 5


def test_a_parallel_draft_runs_once_a_step(
    verifier: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = knowing_eagle3(verifier, parallel=True)
    lengths = []

    def noted(self: Any, input_ids: Tensor, *arguments: Any, **named: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return Eagle3Speculator.draft(self, input_ids, *arguments, **named)

    monkeypatch.setattr(PEagleSpeculator, "draft", noted)
    result = generated(draft, prompt(8), proposal=CHAIN)
    seen = [1, *(1 + n for n in result.accepted[0][:-1])]
    assert lengths == [7, *(n + 3 for n in seen)]


def test_a_parallel_draft_grows_no_trees(verifier: PreTrainedModel) -> None:
    draft = knowing_eagle3(verifier, parallel=True)
    for proposal in (TREE, STATIC_TREE):
        with pytest.raises(GenerationError, match="choose greedy or sampling"):
            generated(draft, prompt(4), proposal=proposal)


OFFLOADED = {
    "embed_tokens": "cpu",
    "fc": "disk",
    "fc_norm": "disk",
    "layers": "disk",
    "norm": "cpu",
    "lm_head": "disk",
    "d2t": "cpu",
    "t2d": "cpu",
    "mask_hidden": "disk",
}
WHOLE = {"": "disk"}


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("device_map", ["auto", OFFLOADED, WHOLE], ids=["auto", "parts", "whole"])
def test_a_spread_draft(
    verifier: PreTrainedModel, draft: Eagle3Speculator, device_map: Any, tmp_path: Path
) -> None:
    draft.save_pretrained(tmp_path / "draft")
    spread = load_draft(
        tmp_path / "draft", verifier=verifier, device_map=device_map, offload_folder=tmp_path
    )
    ids, few = prompt(8, seed=8), {"max_new_tokens": 10}
    for proposal in methods(draft):
        found = generated(spread, ids, proposal=proposal, **few)
        assert torch.equal(found.sequences, own(verifier, ids, **few))
        if proposal is not SAMPLED:
            assert found.accepted == generated(draft, ids, proposal=proposal, **few).accepted
