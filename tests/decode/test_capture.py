"""The hidden states that a draft reads, compared with those that transformers gives out."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from speculators.decode import speculate
from speculators.decode.cache import BlockCache
from speculators.decode.tree import Tree, ancestors_of
from speculators.decode.verification import VerifierPass
from speculators.errors import GenerationError
from speculators.format.config import ProposalMethod
from tiny_models import SIZES, knowing_draft, prompt, tiny_verifier
from toy_draft import ToyDraft

LAYERS = 3
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("norm", {}),
    "mistral": ("norm", {}),
    "qwen2": ("norm", {}),
    "qwen3": ("norm", {"head_dim": 8}),
    "gemma": ("norm", {"head_dim": 8}),
    "gemma2": ("norm", {"head_dim": 8, "sliding_window": 6}),
    "mixtral": ("norm", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt_neox": ("final_layer_norm", {}),
    "gpt2": ("ln_f", {}),
    "opt": ("final_layer_norm", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
"""By model type: the name of the final norm in its decoder, and more keys for its config."""


def random_verifier(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**SIZES, "num_hidden_layers": LAYERS, "initializer_range": 0.3, **MODELS[name][1]}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **settings)
    )
    model.train(False)
    return model


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_states_are_those_of_transformers(name: str) -> None:
    verifier = random_verifier(name)
    ids = prompt(9, rows=2)
    shown = verifier(ids, output_hidden_states=True).hidden_states
    norm = verifier.get_decoder().get_submodule(MODELS[name][0])
    before = hooks_of(verifier)  # transformers' own, by which it gives out hidden states

    for layers in [(2, 0, 3), (1,), (3,)]:
        with VerifierPass(verifier, BlockCache([0, 0]), 20, layers) as verifier_pass:
            _, states = verifier_pass.prefill(ids, None, None)
        parts = states.split(SIZES["hidden_size"], dim=2)
        assert len(parts) == len(layers)
        for layer, part in zip(layers, parts, strict=True):
            # The last entry is after the final norm in transformers.
            normed = norm(part) if layer == LAYERS else part
            torch.testing.assert_close(normed, shown[layer], atol=1e-5, rtol=1e-5)
            assert layer < LAYERS or not torch.allclose(part, shown[layer], atol=1e-2)
    assert hooks_of(verifier) == before


@pytest.mark.parametrize("layers", [(), (2, 0)])
@torch.no_grad()
def test_another_thread_may_run_the_verifier_meanwhile(layers: tuple[int, ...]) -> None:
    verifier: Any = random_verifier("llama")
    ids, main = prompt(5), threading.current_thread()

    def run(tokens: Tensor) -> Tensor:
        with VerifierPass(verifier, BlockCache([0]), 20, layers) as verifier_pass:
            return verifier_pass.prefill(tokens, None, None)[1]

    def run_elsewhere(*_: object) -> None:
        if threading.current_thread() is main:
            thread = threading.Thread(target=run, args=(prompt(8, seed=1),))
            thread.start()
            thread.join()

    expected = run(ids)
    verifier.lm_head.register_forward_hook(run_elsewhere)
    assert torch.equal(run(ids), expected)


@torch.no_grad()
def test_the_states_along_a_path_through_a_tree_are_kept() -> None:
    verifier = random_verifier("llama")
    ids, tokens = prompt(5), torch.tensor([[7, 8, 9, 10, 11]])
    parents = torch.tensor([[0, 0, 0, 2, 3]])
    ancestors = ancestors_of(parents)
    tree = Tree(tokens, parents, ancestors.sum(2) - 1, ancestors)
    path = [0, 2, 3, 4]
    whole = torch.cat((ids, tokens[:, path]), 1)
    shown = verifier(whole, output_hidden_states=True).hidden_states
    expected = torch.cat((shown[2], shown[0]), -1)[:, 5:]
    with VerifierPass(verifier, BlockCache([0]), 20, (2, 0)) as verifier_pass:
        verifier_pass.prefill(ids, None, None)
        verifier_pass.verify(tree)
        kept = verifier_pass.keep(tree, [path])
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("proposal", ["greedy", "dynamic_tree"])
def test_other_verifiers(name: str, proposal: str) -> None:
    verifier: Any = random_verifier(name)
    draft = ToyDraft(verifier, (0, LAYERS))
    ids = prompt(8)
    method = ProposalMethod(proposal_type=proposal)
    found = speculate(draft, verifier, ids, proposal=method, max_new_tokens=16, do_sample=False)
    expected = verifier.generate(ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(found.sequences, expected)


def check_refused(verifier: PreTrainedModel, draft: ToyDraft, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        speculate(draft, verifier, prompt(4), proposal=ProposalMethod(), max_new_tokens=4)
    assert not hooks_of(verifier)


@pytest.mark.parametrize("layer", [-1, 3, 30])
def test_a_layer_that_the_verifier_lacks(layer: int) -> None:
    verifier = tiny_verifier()
    draft = ToyDraft(verifier, (1, layer))
    check_refused(
        verifier, draft, rf"number {layer}, but LlamaForCausalLM has 2 layers.*are 0 to 2;"
    )


def test_layers_that_cannot_be_found() -> None:
    verifier = tiny_verifier()
    draft = ToyDraft(verifier)
    more: Any = nn.ModuleList([nn.Identity(), nn.Identity()])
    verifier.get_decoder().more = more  # which list of two is the decoder layers?
    words = "layers of LlamaForCausalLM could not be found"
    check_refused(verifier, draft, words)
    verifier.get_decoder().layers = nn.ModuleDict({"0": nn.Identity()})
    del verifier.get_decoder().more
    check_refused(verifier, draft, words)


def test_states_that_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = tiny_verifier()
    words = "hidden states of LlamaForCausalLM, which the draft reads, could not be captured"
    draft = knowing_draft(verifier)
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "get_decoder", lambda: verifier)  # whose output has only logits
        with pytest.raises(GenerationError, match=words):
            draft.generate(prompt(4), max_new_tokens=4)

    class Paired(nn.Module):
        """A layer between which the states come in pairs."""

        def forward(self, pairs: Tensor, **_: Any) -> Tensor:
            return pairs

    decoder = verifier.get_decoder()
    toy = ToyDraft(verifier)
    decoder.layers = nn.ModuleList([Paired(), Paired()])
    decoder.embed_tokens.register_forward_hook(lambda _m, _i, out: torch.stack((out, out)))
    decoder.norm.register_forward_hook(lambda _m, _i, out: out[0])
    with pytest.raises(GenerationError, match=words):
        speculate(toy, verifier, prompt(4), proposal=ProposalMethod(), max_new_tokens=4)
