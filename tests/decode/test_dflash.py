"""Drafting and generating with DFlash, DFlash 2 and DSpark drafts."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
)

from block_drafts import (
    E2E,
    KINDS,
    SEQUENTIAL,
    VERIFIER,
    convert_golden,
    golden,
    golden_draft,
    knowing_dflash,
)
from block_drafts import plain_drafting as plain_drafting_of
from distributions import SETTINGS, TOKENS, analytic, chi_square_is_likely, small_verifier
from plain_speculation import plain_chain, plain_steps
from speculators.decode import Generation
from speculators.decode.cache import BlockCache
from speculators.decode.capture import StateCapture
from speculators.decode.context import ContextDraft, ContextDrafter, SequentialDraft
from speculators.decode.proposals import drafter_of
from speculators.decode.sampling import warp_of
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from speculators.models import load_draft
from speculators.models.dflash import DFlashSpeculator
from tiny_models import prompt, tiny_verifier

every_kind = pytest.mark.parametrize("kind", KINDS)
PROPOSALS = ("greedy", "sampling")
NEW = 16
"""How many tokens are generated."""


def drafter(draft: Any, length: int, padding: list[int] | None = None) -> ContextDrafter:
    method = ProposalMethod(speculative_tokens=length)
    made = drafter_of(draft, BlockCache(padding or [0]), method, warp_of(LogitsProcessorList()))
    assert isinstance(made, ContextDrafter)
    return made


def generated(draft: Any, ids: Tensor, **settings: Any) -> Generation:
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": NEW} | settings
    result = draft.generate(ids, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    return result


def own(verifier: Any, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW} | settings
    tokens: Tensor = verifier.generate(ids, **settings)
    return tokens


def batch(lengths: list[int], vocabulary: int = 48) -> dict[str, Tensor]:
    """Prompts of these lengths, padded at the left."""
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    generator = torch.Generator().manual_seed(3)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, vocabulary, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"ids": ids, "attention_mask": mask}


@torch.inference_mode()
def test_from_the_verifiers_states_to_the_references_tokens(tmp_path: Path) -> None:
    """States as they are captured, the first block, and what is generated: dflash 0.1.0's."""
    g, draft = golden(E2E), load_draft(convert_golden(E2E, tmp_path), dtype="float32")
    verifier: Any = draft.attach_verifier(VERIFIER)
    with StateCapture(verifier, draft.verifier_layers) as capture:
        logits = verifier(g["input_ids"]).logits
        states = capture.take()
    assert torch.allclose(logits, g["verifier_logits"], atol=1e-4)
    assert torch.allclose(states, g["target_hidden"], atol=1e-4)
    alone = drafter(draft, 7)
    alone.prefill(g["input_ids"][:, 1:], states[:, :-1])
    tree = alone.propose(g["anchor"][None], states[:, -1:], [1])
    assert torch.equal(tree.tokens[:, 1:], g["draft_tokens"])
    block = torch.tensor([[int(g["anchor"]), *[draft.config.mask_token_id] * 7]])
    output = draft(block, states)
    assert torch.allclose(output.last_hidden_state, g["output_hidden"], atol=1e-4)
    assert torch.allclose(output.logits, g["draft_logits"], atol=1e-4)
    for proposal in PROPOSALS:
        result = generated(draft, g["input_ids"], proposal=proposal, max_new_tokens=24)
        assert torch.equal(result.sequences, g["generated_ids"])
        assert result.offered[0][0] == 7


@pytest.mark.parametrize("name", SEQUENTIAL)
@torch.inference_mode()
def test_its_chains_are_golden(tmp_path: Path, name: str) -> None:
    """Alone, with what it has seen in other parts, and beside a longer row; in both rounds."""
    g, draft = golden(name), golden_draft(name, tmp_path / "draft")
    assert isinstance(draft, SequentialDraft)
    states, anchor = g["target_hidden"], g["block_ids"][:, :1]
    length, context = g["proposed_tokens"].shape[1], states.shape[1]
    tokens = torch.cat((torch.arange(context - 1)[None], anchor), 1)
    for known in (context - 1, context - 4):
        alone = drafter(draft, length)
        alone.prefill(tokens[:, :known], states[:, :known])
        tree = alone.propose(tokens[:, known:], states[:, known:], [context - known])
        assert tree.is_chain
        assert torch.equal(tree.tokens[:, 1:], g["proposed_tokens"])
        assert torch.equal(tree.tokens[:, :1], anchor)
    # The first row is padded by two, and has one new token where the second has three.
    both = drafter(draft, length, [2, 0])
    padded = torch.cat((torch.randn(1, 2, states.shape[2]), states), 1)
    other = torch.randn(1, context + 4, states.shape[2])
    both.prefill(
        torch.zeros(2, context + 1, dtype=torch.long),
        torch.cat((padded[:, :-1], other[:, : context + 1])),
    )
    unseen = torch.tensor([[int(anchor), 7, 7], [1, 2, 3]])
    garbage = torch.cat((states[:, -1:], torch.randn(1, 2, states.shape[2])), 1)
    tree = both.propose(unseen, torch.cat((garbage, other[:, context + 1 :])), [1, 3])
    assert torch.equal(tree.tokens[:1, 1:], g["proposed_tokens"])
    longer = drafter(draft, length)
    longer.prefill(torch.zeros(1, context + 1, dtype=torch.long), other[:, : context + 1])
    expected = longer.propose(unseen[1:], other[:, context + 1 :], [3])
    assert torch.equal(tree.tokens[1:], expected.tokens)
    if "round2_proposed_tokens" in g:
        confirmed = torch.cat((torch.zeros(1, 2).long(), g["round2_block_ids"][:, :1]), 1)
        tree = both.propose(
            confirmed.expand(2, -1), g["round2_target_hidden"].expand(2, -1, -1), [3, 1]
        )
        assert torch.equal(tree.tokens[:1, 1:], g["round2_proposed_tokens"])


@pytest.fixture(scope="module")
def verifier() -> PreTrainedModel:
    return tiny_verifier(num_hidden_layers=3, context=0.001)


@pytest.fixture(scope="module", params=KINDS)
def draft(request: pytest.FixtureRequest, verifier: PreTrainedModel) -> Any:
    return knowing_dflash(verifier, request.param)


def test_it_is_often_right(verifier: PreTrainedModel, draft: Any) -> None:
    """Its first token at least, and those after it where they depend on the one before."""
    assert isinstance(draft, ContextDraft)
    for proposal in PROPOSALS:
        results = []
        for seed in range(2):
            ids = prompt(8, seed=seed)
            results.append(generated(draft, ids, proposal=proposal))
            assert torch.equal(results[-1].sequences, own(verifier, ids))
        accepted = [n for result in results for n in result.accepted[0]]
        if proposal == "greedy":
            assert sum(accepted) > 0.7 * len(accepted)
            assert max(accepted) >= (3 if isinstance(draft, SequentialDraft) else 1)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_it_accepts_what_a_plain_evaluation_accepts(
    verifier: PreTrainedModel, draft: Any, length: int
) -> None:
    """Also with fewer tokens than a block drafts: the reference then runs on a shorter block."""
    ids = prompt(6, seed=length)
    with torch.no_grad():
        expected = plain_steps(
            verifier,
            lambda tokens: plain_drafting_of(draft, verifier, tokens, length),
            ids[0].tolist(),
            NEW,
            plain_chain(length),
        )
    result = generated(draft, ids, num_draft_tokens=length)
    assert (result.sequences[0].tolist(), result.accepted[0], result.offered[0]) == expected


@pytest.mark.parametrize("kind", ["windows", "dflash2", "rnn"])
def test_rows_of_a_batch_draft_as_if_alone(verifier: PreTrainedModel, kind: str) -> None:
    draft, lengths = knowing_dflash(verifier, kind), [5, 1, 9]
    inputs = batch(lengths)
    ends = own(verifier, **inputs)[[0, 2], [12, 18]].tolist()
    endings: list[dict[str, Any]] = [{}, {"eos_token_id": ends}]
    for more in endings:
        expected = own(verifier, **inputs, **more)
        sampled = generated(draft, proposal="sampling", **inputs, **more)
        result = generated(draft, **inputs, **more)
        assert torch.equal(result.sequences, expected)
        assert torch.equal(sampled.sequences, expected)
        for row, length in enumerate(lengths):
            alone = generated(draft, inputs["ids"][row : row + 1, -length:], **more)
            assert result.accepted[row] == alone.accepted[0]
            assert result.offered[row] == alone.offered[0]


@pytest.mark.parametrize(
    ("kind", "name"), [("dflash", "top_p"), ("dflash2", "plain"), ("rnn", "temperature")]
)
def test_sequences_have_the_verifiers_distribution(kind: str, name: str) -> None:
    verifier, settings = small_verifier(), SETTINGS[name]
    tokens = None if kind == "dflash2" else [1, 2, 4]
    draft = knowing_dflash(verifier, kind, tokens=tokens, layers=(0, 1))
    result = generated(
        draft,
        torch.tensor([[1, 3, 2]]),
        proposal="sampling",
        num_draft_tokens=3,
        do_sample=True,
        max_new_tokens=TOKENS,
        num_return_sequences=1500,
        **settings,
    )
    counts = Counter(map(tuple, result.sequences[:, 3:].tolist()))
    assert chi_square_is_likely(counts, analytic(verifier, [1, 3, 2], settings))
    steps = [n for row in result.accepted for n in row]
    assert sum(steps) > len(steps) / 5


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "vanilla", "gated", "rnn"])
@torch.inference_mode()
def test_drawn_tokens_come_from_the_distributions_that_are_told(kind: str) -> None:
    """Each of them, given those before it: otherwise coupling would not be exact."""
    verifier = small_verifier()
    tokens = None if kind == "dflash2" else [0, 1, 3, 4]
    draft = knowing_dflash(verifier, kind, tokens=tokens, layers=(0, 1), doubt=0.3)
    rows, states = 3000, torch.randn(1, 3, 2 * verifier.config.hidden_size)
    method = ProposalMethod(proposal_type="sampling", speculative_tokens=3)
    warm = warp_of(LogitsProcessorList([TemperatureLogitsWarper(20.0)]))
    one = drafter_of(draft, BlockCache([0] * rows), method, warm)
    torch.manual_seed(5)
    anchors = torch.tensor([[1, 2, 3]]).expand(rows, -1)
    tree = one.propose(anchors, states.expand(rows, -1, -1), [3] * rows)
    assert tree.probabilities is not None
    before: dict[tuple[int, ...], list[int]] = {}
    for row, drawn in enumerate(tree.tokens[:, 1:].tolist()):
        for place in range(3):
            before.setdefault(tuple(drawn[:place]), []).append(row)
    known = {path: rows for path, rows in before.items() if len(rows) > 300}
    assert len(known) > 3
    told = set()
    for path, among in known.items():
        q = tree.probabilities[among, len(path)]
        assert torch.allclose(q, q[:1].expand_as(q), atol=1e-5)
        told.add(tuple(round(p, 3) for p in q[0].tolist()))
        counts = Counter(tree.tokens[among, len(path) + 1].tolist())
        probabilities = {token: p for token, p in enumerate(q[0].tolist()) if p > 0}
        assert chi_square_is_likely(counts, probabilities)
    # One for each place, or more, since they depend on the tokens drawn before.
    assert len(told) <= 3 if kind == "dflash" else len(told) > 3


def test_it_runs_once_a_step(verifier: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = knowing_dflash(verifier, "gated")
    context, blocks = [], []
    remember, run_block = DFlashSpeculator.remember, DFlashSpeculator.run_block

    def noted(self: Any, states: Tensor, *arguments: Any) -> None:
        context.append(states.shape[1])
        remember(self, states, *arguments)

    def noted_block(self: Any, tokens: Tensor, *arguments: Any) -> Tensor:
        blocks.append(tokens.shape[1])
        return run_block(self, tokens, *arguments)

    monkeypatch.setattr(DFlashSpeculator, "remember", noted)
    monkeypatch.setattr(DFlashSpeculator, "run_block", noted_block)
    result = generated(draft, prompt(8))
    seen = [1, *(1 + n for n in result.accepted[0][:-1])]
    assert context == [7, *seen]
    assert blocks == [5] * len(seen)
    blocks.clear()
    generated(draft, prompt(8), num_draft_tokens=2)
    assert set(blocks) == {3}


@every_kind
def test_it_proposes_what_a_block_has(verifier: PreTrainedModel, kind: str) -> None:
    draft = knowing_dflash(verifier, kind)
    drafted = draft.drafted_per_block
    assert drafted == (5 if draft.config.sample_from_anchor else 4)
    assert generated(draft, prompt(4)).offered[0][0] == drafted
    with pytest.raises(GenerationError, match=rf"drafts up to {drafted} tokens in a block, not"):
        generated(draft, prompt(4), num_draft_tokens=drafted + 1)
    for proposal in ("static_tree", "dynamic_tree"):
        with pytest.raises(GenerationError, match="choose greedy or sampling"):
            generated(draft, prompt(4), proposal=proposal)


def test_it_needs_the_verifiers_layers(verifier: PreTrainedModel) -> None:
    draft = knowing_dflash(verifier, layers=(1, 2))
    draft.config.aux_hidden_state_layer_ids = [1, 9]
    with pytest.raises(GenerationError, match="hidden state of number 9"):
        generated(draft, prompt(4))


def test_it_reads_what_leaves_the_last_layer(verifier: PreTrainedModel) -> None:
    draft = knowing_dflash(verifier, "vanilla", layers=(1, 3))
    ids = prompt(8)
    assert torch.equal(generated(draft, ids).sequences, own(verifier, ids))


OFFLOADED = {
    "fc": "disk",
    "hidden_norm": "disk",
    "layers": "disk",
    "norm": "cpu",
    "candidate_selector": "disk",
    "markov_head": "disk",
}


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("kind", ["windows", "interleaved", "dflash2", "rnn"])
def test_a_spread_draft(verifier: PreTrainedModel, kind: str, tmp_path: Path) -> None:
    draft = knowing_dflash(verifier, kind)
    draft.save_pretrained(tmp_path / "draft")
    spread = load_draft(
        tmp_path / "draft", verifier=verifier, device_map=OFFLOADED, offload_folder=tmp_path
    )
    ids = prompt(8, seed=8)
    for proposal in PROPOSALS:
        found = generated(spread, ids, proposal=proposal)
        assert torch.equal(found.sequences, own(verifier, ids))
        if proposal == "greedy":
            assert found.accepted == generated(draft, ids, proposal=proposal).accepted


MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def test_a_spread_verifier(tmp_path: Path) -> None:
    verifier: Any = tiny_verifier(num_hidden_layers=3, context=0.001)
    verifier.save_pretrained(tmp_path / "verifier")
    draft = knowing_dflash(verifier, "vanilla")
    ids = prompt(8, seed=8)
    expected = generated(draft, ids)
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "verifier",
        device_map=MAP,
        offload_folder=tmp_path / "offloaded",
    )
    draft.attach_verifier(spread)
    found = generated(draft, ids)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.accepted == expected.accepted
