"""The MTP of Qwen's models as a draft, against golden vectors and plain operations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

from helpers import TOLERANCE, Tensors, config_of, largest_difference
from mtp_verifiers import GOLDEN_MTP, mtp_of, stacked, write_verifier
from plain_mtp import plain_mtp
from speculators.errors import FormatError, GenerationError, VerifierError
from speculators.format.config import ProposalMethod
from speculators.models.mtp import QwenMtp
from speculators.models.output import DraftOutput
from speculators.mtp.cut import cut
from tiny_models import tiny_verifier

STEPS = 3
LENGTH = 14


@pytest.fixture(scope="module")
def golden() -> Tensors:
    return load_file(GOLDEN_MTP / "golden.safetensors")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> QwenMtp:
    directory = cut(GOLDEN_MTP, tmp_path_factory.mktemp("mtp") / "cut")
    return QwenMtp.load(directory, verifier=GOLDEN_MTP)


def output_of(drafted: DraftOutput) -> Tensor:
    assert drafted.last_hidden_state is not None
    return drafted.last_hidden_state


@torch.no_grad()
def steps_of(draft: QwenMtp, golden: Tensors) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and logits of each step, each step fed with the states of the one before."""
    found: list[tuple[Tensor, Tensor]] = []
    states = draft.project(golden["hidden_states"][:, :LENGTH])
    for step in range(STEPS):
        tokens = golden["input_ids"][:, step + 1 : step + 1 + LENGTH]
        states = output_of(draft.draft(tokens, states))
        found.append((states, draft.logits(states)))
    return found


def test_the_golden_steps(draft: QwenMtp, golden: Tensors) -> None:
    for step, (states, logits) in enumerate(steps_of(draft, golden)):
        assert largest_difference(states, golden[f"step{step}_hidden"]) < TOLERANCE
        assert largest_difference(logits, golden[f"step{step}_logits"]) < TOLERANCE
        assert torch.equal(logits.argmax(-1), golden[f"step{step}_logits"].argmax(-1))


def test_plain_operations_give_the_golden_steps(golden: Tensors) -> None:
    tensors = load_file(GOLDEN_MTP / "model.safetensors")
    mtp = {name: it for name, it in tensors.items() if name.startswith("mtp.")}
    states = golden["hidden_states"][0, :LENGTH]
    for step in range(STEPS):
        tokens = golden["input_ids"][0, step + 1 : step + 1 + LENGTH]
        embedded = tensors["model.embed_tokens.weight"][tokens]
        states = plain_mtp(mtp, config_of(GOLDEN_MTP), embedded, states)
        assert largest_difference(states, golden[f"step{step}_hidden"][0]) < TOLERANCE


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_qwen3_5_is_the_same_function(tmp_path: Path, golden: Tensors, kind: str) -> None:
    """Its MTP differs in what surrounds it: the config, and experts or none."""
    directory = cut(GOLDEN_MTP, tmp_path / "cut")
    text = config_of(directory) | {"model_type": f"{kind}_text", "mtp_num_hidden_layers": 1}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "partial_rotary_factor": text.pop("partial_rotary_factor"),
        "mrope_section": [1, 1, 0],
    }
    tensors = load_file(directory / "model.safetensors")
    if kind == "qwen3_5":
        generator = torch.Generator().manual_seed(0)
        tensors = {name: it for name, it in tensors.items() if ".mlp." not in name}
        for matrix, shape in (("gate", (128, 64)), ("up", (128, 64)), ("down", (64, 128))):
            name = f"mtp.layers.0.mlp.{matrix}_proj.weight"
            tensors[name] = torch.randn(shape, generator=generator) * 0.1
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text}))
    found = steps_of(QwenMtp.load(directory, verifier=GOLDEN_MTP), golden)
    states = golden["hidden_states"][0, :LENGTH]
    embedding = load_file(GOLDEN_MTP / "model.safetensors")["model.embed_tokens.weight"]
    for step in range(STEPS):
        tokens = golden["input_ids"][0, step + 1 : step + 1 + LENGTH]
        states = plain_mtp(tensors, config_of(GOLDEN_MTP), embedding[tokens], states)
        assert largest_difference(found[step][0][0], states) < TOLERANCE


def test_a_cache_makes_no_difference(draft: QwenMtp, golden: Tensors) -> None:
    tokens = golden["input_ids"][:, 1 : 1 + LENGTH]
    states = draft.project(golden["hidden_states"][:, :LENGTH])
    with torch.no_grad():
        first = draft.draft(tokens[:, :9], states[:, :9], use_cache=True)
        rest = draft.draft(tokens[:, 9:], states[:, 9:], cache=first.cache)
    found = torch.cat((output_of(first), output_of(rest)), 1)
    assert largest_difference(found, golden["step0_hidden"]) < TOLERANCE


def test_stacked_experts_are_the_same(tmp_path: Path, draft: QwenMtp, golden: Tensors) -> None:
    directory = cut(GOLDEN_MTP, tmp_path / "cut")
    tensors = load_file(directory / "model.safetensors")
    place = "mtp.layers.0.mlp.experts"
    each = {name: it for name, it in tensors.items() if not name.startswith(place)}
    save_file({**each, **stacked(tensors, place, 4)}, directory / "model.safetensors")
    again = QwenMtp.load(directory, verifier=GOLDEN_MTP)
    for (states, _), (others, _) in zip(
        steps_of(draft, golden), steps_of(again, golden), strict=True
    ):
        assert torch.equal(states, others)


@pytest.mark.parametrize("method", ["greedy", "static_tree", "dynamic_tree"])
def test_decoding_with_it_is_lossless(tmp_path: Path, method: str) -> None:
    """A verifier of another kind, but of the same sizes: any draft must leave its output alone."""
    directory = cut(GOLDEN_MTP, tmp_path / "cut")
    verifier = tiny_verifier("qwen3", vocab_size=256, hidden_size=64, context=0.5)
    draft = QwenMtp.load(directory, verifier=verifier)
    prompts = torch.randint(1, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = verifier.generate(prompts, max_new_tokens=16, do_sample=False)  # type: ignore[operator]
    proposal = ProposalMethod(proposal_type=method)
    found = draft.generate(prompts, proposal=proposal, max_new_tokens=16, do_sample=False)
    assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("method", ["greedy", "sampling"])
def test_decoding_its_own_kind_of_verifier_is_lossless(tmp_path: Path, method: str) -> None:
    """With linear attention, whose state is taken back when drafted tokens are rejected."""
    config = {k: v for k, v in config_of(GOLDEN_MTP).items() if k != "model_type"}
    torch.manual_seed(0)
    verifier: Any = Qwen3NextForCausalLM(Qwen3NextConfig(**config)).eval()
    verifier.generation_config.update(eos_token_id=None, pad_token_id=0)
    draft = QwenMtp.load(cut(GOLDEN_MTP, tmp_path / "cut"), verifier=verifier)
    ids = torch.randint(1, 256, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = verifier.generate(ids, max_new_tokens=16, do_sample=False)
    # With a top_k of 1, sampling has one outcome: the greedy one.
    settings = {"do_sample": True, "top_k": 1} if method == "sampling" else {"do_sample": False}
    proposal = ProposalMethod(proposal_type=method)
    found = draft.generate(ids, proposal=proposal, max_new_tokens=16, **settings)
    assert torch.equal(found.sequences, expected)
    with pytest.raises(GenerationError, match=r"linear attention.*choose greedy or sampling"):
        draft.generate(ids, proposal=ProposalMethod(proposal_type="static_tree"), max_new_tokens=2)


def test_what_is_not_computed(tmp_path: Path) -> None:
    other = cut(write_verifier(tmp_path / "deepseek", "deepseek_v3"), tmp_path / "cut")
    with pytest.raises(FormatError, match=r"cannot be run here, since it is for deepseek_v3: only"):
        QwenMtp.load(other, verifier=GOLDEN_MTP)
    several = cut(write_verifier(tmp_path / "several", "qwen3_5_moe"), tmp_path / "two")
    with pytest.raises(FormatError, match=r"since it has 2 layers"):
        QwenMtp.load(several, verifier=GOLDEN_MTP)
    mtp = mtp_of("qwen3_next")
    name = "mtp.layers.0.self_attn.q_proj.weight"
    mtp |= {name: mtp[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    quantized = write_verifier(tmp_path / "fp8", mtp=mtp)
    with pytest.raises(FormatError, match=rf"since it is quantized \({name} is F8_E4M3\)"):
        QwenMtp.load(quantized, verifier=GOLDEN_MTP)


def test_a_verifier_that_does_not_fit(draft: QwenMtp) -> None:
    with pytest.raises(VerifierError, match="does not fit"):
        draft.attach_verifier(tiny_verifier("llama"))
    with pytest.raises(VerifierError, match="needs the whole verifier"):
        draft.generate(torch.ones(1, 3, dtype=torch.long))
