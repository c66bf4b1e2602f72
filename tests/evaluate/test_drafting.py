"""What a score finds is what decoding does, for every kind of draft and of proposal."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel

from block_drafts import KINDS, NAMES, golden, golden_draft, knowing_dflash, lend
from eagle3 import knowing_eagle3
from speculators.decode import Generation
from speculators.decode.recurrent import RecurrentDraft
from speculators.decode.sampling import warp_of
from speculators.decode.tree import EAGLE1_TREE, chain
from speculators.evaluate.metrics import (
    Acceptance,
    acceptance_rates,
    count_steps,
    expect_steps,
    total,
)
from speculators.evaluate.recording.context import ContextTexts
from speculators.evaluate.recording.recurrent import RecurrentTexts
from speculators.evaluate.recording.scoring import drafted_texts
from speculators.evaluate.recording.texts import Text, decode_texts, layer_states
from speculators.evaluate.recording.warping import recorded_warp
from speculators.evaluate.report import Settings
from speculators.evaluate.subject.loading import generation_config
from speculators.format.config import ProposalMethod
from speculators.models.speculator import Speculator
from tiny_models import knowing_draft, prompt, random_draft, tiny_verifier

CPU = torch.device("cpu")
NEW_TOKENS = 20
LONGEST = 8
LENGTHS = (1, 3, LONGEST)
PROMPTS = [prompt(length, seed=length)[0].tolist() for length in (9, 1, 14)]


def common_tokens(verifier: PreTrainedModel) -> list[int]:
    """Some tokens that its texts are mostly made of: a guess among them is often right."""
    texts = decode_texts(verifier, PROMPTS, settings(), beyond=0, device=CPU)
    said = Counter(token for text in texts for token in text.tokens[text.prompt_tokens :].tolist())
    return sorted(token for token, _ in said.most_common(4))


def parallel_draft(verifier: PreTrainedModel) -> Speculator:
    return knowing_eagle3(verifier, parallel=True, doubt=0.3, tokens=common_tokens(verifier))


def block_draft(verifier: PreTrainedModel, kind: str) -> Speculator:
    """Its tokens after the first are often right: they follow the token before, or are few."""
    tokens, doubt = (None, 0.3) if kind in SEQUENTIAL else (common_tokens(verifier), 0.2)
    draft: Speculator = knowing_dflash(
        verifier, kind, block_size=1 + LONGEST, doubt=doubt, tokens=tokens
    )
    return draft


SEQUENTIAL = ("dflash2", "vanilla", "gated", "rnn")

RECURRENT: dict[str, Callable[[PreTrainedModel], Speculator]] = {
    "EAGLE": knowing_draft,
    "layernorms": lambda verifier: random_draft(verifier, layernorms=True),
    "EAGLE-3": knowing_eagle3,
    "P-EAGLE": parallel_draft,
}
DRAFTS = RECURRENT | {kind: partial(block_draft, kind=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def verifier() -> PreTrainedModel:
    return tiny_verifier()


def settings(**changes: Any) -> Settings:
    return Settings(prompts_total=len(PROMPTS), max_new_tokens=NEW_TOKENS, **changes)


def recorded(
    verifier: PreTrainedModel, draft: Speculator, prompts: Sequence[list[int]], how: Settings
) -> list[Text]:
    """Texts with the states that a draft reads."""
    texts = decode_texts(verifier, prompts, how, beyond=LONGEST - 1, device=CPU)
    layers = draft.verifier_layers
    if not layers:
        return texts
    known = [text.tokens[: len(text.states)] for text in texts]
    states = layer_states(verifier, known, layers, CPU)
    return [
        Text(
            text.prompt_tokens,
            text.new_tokens,
            text.tokens,
            torch.cat([by_layer[layer] for layer in layers], -1),
            text.probabilities,
        )
        for text, by_layer in zip(texts, states, strict=True)
    ]


def decoded(
    draft: Speculator, prompts: Sequence[list[int]], method: ProposalMethod, how: Settings
) -> list[Acceptance]:
    """What decoding counts, by prompt; prompts of one length are decoded together."""
    assert draft.verifier is not None
    generation = generation_config(draft.verifier, how, NEW_TOKENS)
    generation.return_dict_in_generate = True
    together = [[*prompts]] if len({*map(len, prompts)}) == 1 else [[one] for one in prompts]
    counts = []
    for some in together:
        found = draft.generate(torch.tensor(some), proposal=method, generation_config=generation)
        assert isinstance(found, Generation)
        counts += list(map(count_steps, found.accepted, found.offered))
    return counts


@pytest.fixture(scope="module", params=[None, "an end"], ids=["no end", "an end"])
def ended(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A verifier whose texts have their full length, or end earlier."""
    model = tiny_verifier()
    if request.param:
        [text] = decode_texts(model, PROMPTS[:1], settings(), beyond=0, device=CPU)
        model.generation_config.eos_token_id = text.tokens[len(PROMPTS[0]) + 9].item()
        ended = decode_texts(model, PROMPTS, settings(), beyond=0, device=CPU)
        assert [1 < text.new_tokens < NEW_TOKENS for text in ended].count(True) > 1
    return model


@pytest.mark.parametrize("name", DRAFTS)
def test_chains_and_trees_are_accepted_as_in_decoding(ended: PreTrainedModel, name: str) -> None:
    draft = DRAFTS[name](ended)
    texts = recorded(ended, draft, PROMPTS, settings())
    paths = [chain(length) for length in LENGTHS]
    methods = [ProposalMethod(speculative_tokens=length) for length in LENGTHS]
    if name in RECURRENT and name != "P-EAGLE":
        paths.append(EAGLE1_TREE)
        methods.append(ProposalMethod(proposal_type="static_tree"))
    with torch.inference_mode():
        found = drafted_texts(draft, texts).survival(paths)
    for method, by_text in zip(methods, found, strict=True):
        expected = decoded(draft, PROMPTS, method, settings())
        assert [expect_steps(survival) for survival in by_text] == expected
    # That with layernorms is random, and never right; the others often are.
    if name != "layernorms" and ended.generation_config.eos_token_id is None:
        assert total(expected).accepted[1] > 2, "too simple a case to tell much"


@pytest.mark.parametrize(
    "name", ["EAGLE", pytest.param("layernorms", marks=pytest.mark.exhaustive), "EAGLE-3"]
)
@pytest.mark.parametrize(("nodes", "depth", "top_k"), [(20, 7, 4), (59, 4, 10), (4, 3, 5)])
def test_trees_grow_as_in_decoding(
    ended: PreTrainedModel, name: str, nodes: int, depth: int, top_k: int
) -> None:
    draft = DRAFTS[name](ended)
    method = ProposalMethod(
        proposal_type="dynamic_tree",
        speculative_tokens=nodes,
        tree_depth=depth,
        tree_top_k=top_k,
    )
    texts = recorded(ended, draft, PROMPTS, settings())
    with torch.inference_mode():
        assert isinstance(draft, RecurrentDraft)
        found = RecurrentTexts(draft, texts).grown(nodes, depth, top_k)
    expected = decoded(draft, PROMPTS, method, settings())
    assert [count_steps(*counted) for counted in found] == expected


def test_texts_are_those_of_the_verifier_alone(verifier: PreTrainedModel) -> None:
    """In a batch with padding, and beyond their end."""
    texts = decode_texts(verifier, PROMPTS, settings(), beyond=5, device=CPU)
    for tokens, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([tokens])
        alone = verifier.generate(ids, max_new_tokens=NEW_TOKENS + 5, do_sample=False)  # type: ignore[operator]
        assert text.tokens.tolist() == alone[0].tolist()
        assert (text.prompt_tokens, text.new_tokens) == (len(tokens), NEW_TOKENS)
        hidden = verifier(alone, output_hidden_states=True).hidden_states
        known = len(tokens) + NEW_TOKENS - 1
        torch.testing.assert_close(text.states, hidden[-1][0, :known], atol=1e-4, rtol=1e-4)
        [by_layer] = layer_states(verifier, [text.tokens[:known]], [0, 1], CPU)
        for layer, states in by_layer.items():
            torch.testing.assert_close(states, hidden[layer][0, :known], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("EAGLE", {"recurrent.ROOTS": 7, "recurrent.LOGITS": 500}),
        ("rnn", {"context.SLOTS": 300}),
        ("rnn", {"context.LOGITS": 500}),
    ],
)
def test_many_roots_are_drafted_from_in_portions(
    verifier: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str, limits: dict[str, int]
) -> None:
    draft = DRAFTS[name](verifier)
    texts = recorded(verifier, draft, PROMPTS, settings())
    with torch.inference_mode():
        whole = drafted_texts(draft, texts).survival([chain(3)])
        for limit, value in limits.items():
            monkeypatch.setattr(f"speculators.evaluate.recording.{limit}", value)
        assert drafted_texts(draft, texts).survival([chain(3)]) == whole


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_golden_proposals_are_accepted(tmp_path: Path, name: str) -> None:
    """As far as a text has them, among other texts, with the probabilities of golden logits."""
    g = golden(name)
    g = {"lm_head.weight": g["embed_tokens.weight"]} | g  # one has no head
    draft = lend(golden_draft(name, tmp_path / "draft"), g)
    states, anchor = g["target_hidden"][0], g["block_ids"][0, :1]
    logits = g.get("conditioned_logits", g.get("logits"))
    if logits is None:
        logits = g["output_hidden"][:, 1:] @ g["lm_head.weight"].T
    proposed = g.get("proposed_tokens", logits.argmax(-1))[0]
    length, context = len(proposed), len(states)

    def text(right: int) -> Text:
        drafted = torch.cat((proposed[:right], proposed[right:] + 1))
        tokens = torch.cat((torch.arange(context), anchor, drafted))
        return Text(context, 2, tokens, torch.cat((states, torch.randn_like(states[:1]))), None)

    other = Text(3, 20, torch.arange(23 + length), torch.randn(22, states.shape[1]), None)
    drafted = ContextTexts(draft, [text(length), other, text(2)])
    [found] = drafted.survival([chain(length)])
    assert found[0] == [[1] * length]
    assert found[2] == [[1, 1] + [0] * (length - 2)]
    assert len(found[1]) == 19
    if name != "dflash2":  # whose golden logits are those before the selector
        warp = warp_of(LogitsProcessorList())
        [chances] = drafted.sampled_survival([length], warp)
        expected = logits[0].softmax(-1).max(-1).values.cumprod(0)
        torch.testing.assert_close(torch.tensor(chances[0][0]), expected, rtol=1e-3, atol=1e-7)


SAMPLES = 60


EVERY_WAY = [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("name", "temperature", "top_p"),
    [
        *(("EAGLE", *how) for how in EVERY_WAY),
        *(("P-EAGLE", *how) for how in EVERY_WAY),
        ("dflash2", 1.0, 1.0),
        ("rnn", 0.7, 0.8),
        ("gated", 0.0, 1.0),
    ],
)
def test_sampled_chains_are_accepted_as_often_as_in_decoding(
    name: str, temperature: float, top_p: float
) -> None:
    """Mean tokens per step over many texts, by decoding and by expectation: 4 standard errors."""
    model = tiny_verifier()
    draft = DRAFTS[name](model)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 0.7  # so that there is a choice
    how = settings(temperature=temperature, top_p=top_p)
    method = ProposalMethod(proposal_type="sampling", speculative_tokens=3)
    prompts = [prompt(6, seed=seed)[0].tolist() for seed in range(SAMPLES)]
    torch.manual_seed(5)
    texts = recorded(model, draft, prompts, how)
    with torch.inference_mode():
        [survivals] = drafted_texts(draft, texts).sampled_survival([3], recorded_warp(how))
    scored = [expect_steps(survival) for survival in survivals]
    measured = decoded(draft, prompts, method, how)
    for position in range(3):
        found, expected = (
            [acceptance_rates(counts)[position] for counts in one] for one in (scored, measured)
        )
        error = (stdev(found) ** 2 + stdev(expected) ** 2) ** 0.5 / SAMPLES**0.5
        assert abs(mean(found) - mean(expected)) < 4 * error
        if position == 0:
            assert 0.05 < mean(expected) < 0.9, "a case that tells nothing"
            assert error < 0.2 * mean(expected)


def test_probabilities_are_those_of_the_warped_distribution() -> None:
    model = tiny_verifier(context=1.0)
    how = settings(temperature=0.7, top_p=0.8)
    [text] = decode_texts(model, PROMPTS[:1], how, beyond=3, device=CPU)
    assert text.probabilities is not None
    logits = model(text.tokens[None]).logits[0, len(PROMPTS[0]) - 1 : -1]
    warped = recorded_warp(how)(logits).softmax(-1)
    expected = warped.gather(1, text.tokens[len(PROMPTS[0]) :, None])[:, 0]
    torch.testing.assert_close(text.probabilities, expected, atol=1e-4, rtol=1e-4)
