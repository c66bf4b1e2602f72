"""DFlash, DFlash 2 and DSpark drafts as models: golden vectors, context, blocks, saving."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from block_drafts import (
    GOLDEN_FAMILIES,
    NAMES,
    SEQUENTIAL,
    VERIFIER,
    convert_golden,
    golden,
    golden_draft,
    in_format,
    lend,
    reference_of,
)
from helpers import TOLERANCE, config_of, largest_difference, stored_tensors
from speculators.checkpoint.hub.upload import SAVED
from speculators.convert.conversion import convert
from speculators.errors import FormatError, GenerationError, ValidationError, VerifierError
from speculators.evaluate.subject.opening import proposals_of
from speculators.families.converted import open_converted
from speculators.families.registry import families
from speculators.format.config import ProposalMethod
from speculators.models import load_draft
from speculators.models.dflash import (
    DFlash2Speculator,
    DFlashSpeculator,
    DFlashSpeculatorConfig,
    DSparkSpeculator,
)

CLASSES = {"dflash": DFlashSpeculator, "dflash2": DFlash2Speculator, "dspark": DSparkSpeculator}
every_golden = pytest.mark.parametrize("name", NAMES)
every_sequential = pytest.mark.parametrize("name", SEQUENTIAL)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every golden draft, converted with validation; tests must not change these."""
    root = tmp_path_factory.mktemp("dflash")
    return {name: convert_golden(name, root) for name in NAMES}


def draft_of(converted: dict[str, Path], name: str, **settings: Any) -> Any:
    return lend(load_draft(converted[name], **{"dtype": "float32"} | settings), golden(name))


def close(found: Tensor | None, expected: Tensor) -> bool:
    assert found is not None
    assert found.shape == expected.shape
    return largest_difference(found, expected) < TOLERANCE


def before(g: dict[str, Tensor]) -> Tensor:
    """The token before each proposed one."""
    return torch.cat((g["block_ids"][:, :1], g["proposed_tokens"][:, :-1]), 1)


@every_golden
@torch.inference_mode()
def test_it_computes_a_block(converted: dict[str, Path], name: str) -> None:
    g, draft = golden(name), draft_of(converted, name)
    assert type(draft) is CLASSES[name.split("_", maxsplit=1)[0]]
    if "lm_head.weight" not in g:
        draft.borrowed_head = nn.Linear(64, 320, bias=False)
    output = draft(g["block_ids"], g["target_hidden"])
    assert close(output.last_hidden_state, g["output_hidden"])
    if "logits" in g:
        assert close(output.logits, g["logits"])
        assert torch.equal(output.logits.argmax(-1), g["logits"].argmax(-1))


@torch.inference_mode()
def test_eager_attention_computes_the_same(converted: dict[str, Path]) -> None:
    g = golden("dflash_window")
    draft = draft_of(converted, "dflash_window", attn_implementation="eager")
    output = draft.draft(g["block_ids"], g["target_hidden"])
    assert close(output.last_hidden_state, g["output_hidden"])


@every_sequential
@torch.inference_mode()
def test_tokens_depend_on_those_before(converted: dict[str, Path], name: str) -> None:
    g, draft = golden(name), draft_of(converted, name)
    output = draft(g["block_ids"], g["target_hidden"], tokens_before=before(g))
    assert torch.equal(draft.to_verifier(output.logits.argmax(-1)), g["proposed_tokens"])
    own = draft(g["block_ids"], g["target_hidden"]).logits.argmax(-1)
    assert not torch.equal(draft.to_verifier(own), g["proposed_tokens"])
    if "conditioned_logits" in g:
        assert close(output.logits, g["conditioned_logits"])
    if "confidence" in g:
        states = output.last_hidden_state[:, -g["logits"].shape[1] :]
        assert close(draft.confidence(states, before(g)), g["confidence"])


@every_golden
@torch.inference_mode()
def test_the_reference_computes_the_same(converted: dict[str, Path], name: str) -> None:
    g, draft = golden(name), draft_of(converted, name)
    reference = reference_of(draft)
    assert reference.cannot_evaluate() is None
    outputs = reference(g["embed_tokens.weight"][g["block_ids"][0]], g["target_hidden"][0])
    assert close(outputs, g["output_hidden"][0])
    if "logits" not in g:
        return
    states = outputs[-g["logits"].shape[1] :]
    logits = reference.logits(states, None if draft.lm_head else g["lm_head.weight"])
    assert close(logits, g["logits"][0])
    if "proposed_tokens" in g:
        conditioned = reference.conditioned(logits, states, before(g)[0])
        assert torch.equal(draft.to_verifier(conditioned.argmax(-1)), g["proposed_tokens"][0])
    if "confidence" in g:
        assert close(reference.confidence(states, before(g)[0]), g["confidence"][0])
        assert close(conditioned, g["conditioned_logits"][0])


@pytest.mark.parametrize("name", ["dflash_full", "dflash2"])
@torch.inference_mode()
def test_context_is_read_once(converted: dict[str, Path], name: str) -> None:
    """The second round of the golden vectors, with its context in one, two and many parts."""
    g, draft = golden(name), draft_of(converted, name)
    states = torch.cat((g["target_hidden"], g["round2_target_hidden"]), 1)
    block = g["round2_block_ids"]
    begun = draft(g["block_ids"], g["target_hidden"], use_cache=True)
    output = draft(block, g["round2_target_hidden"], cache=begun.cache)
    assert close(output.last_hidden_state, g["round2_output_hidden"])
    assert close(output.logits, g["round2_logits"])
    assert output.past_key_values is begun.past_key_values
    # The block is not kept.
    again = draft(block, past_key_values=output.past_key_values)
    assert close(again.logits, g["round2_logits"])
    assert close(draft(block, states).logits, g["round2_logits"])
    cache = None
    for place in range(states.shape[1]):
        output = draft(block, states[:, place : place + 1], use_cache=True, cache=cache)
        cache = output.cache
    assert close(output.logits, g["round2_logits"])


@every_golden
@torch.inference_mode()
def test_rows_of_a_padded_batch_do_not_see_padding(converted: dict[str, Path], name: str) -> None:
    g, draft = golden(name), draft_of(converted, name)
    states, block = g["target_hidden"], g["block_ids"].expand(3, -1)
    rows = [states[0], states[0, :5], states[0, 3:]]
    padded, mask = torch.randn(3, 12, states.shape[2]), torch.zeros(3, 12, dtype=torch.long)
    for row, real in enumerate(rows):
        padded[row, 12 - len(real) :] = real
        mask[row, 12 - len(real) :] = 1
    begun = draft.draft(block, padded, mask, use_cache=True)
    assert close(begun.last_hidden_state[:1], g["output_hidden"])
    for row, real in enumerate(rows):
        alone = draft.draft(block[:1], real[None]).last_hidden_state
        assert close(begun.last_hidden_state[row], alone[0])
    # Each row goes on by another number of tokens.
    more = torch.randn(3, 4, states.shape[2])
    draft.remember(more, [1, 4, 2], begun.cache)
    output = draft.run_block(block, begun.cache)
    for row, (real, count) in enumerate(zip(rows, (1, 4, 2), strict=True)):
        context = torch.cat((real, more[row, :count]))[None]
        alone = draft.draft(block[:1], context).last_hidden_state
        assert close(output[row], alone[0])


@torch.inference_mode()
def test_layers_see_what_their_types_say(tmp_path: Path) -> None:
    """Windows to both sides, to one side, and only in layers that slide, by dflash 0.1.0."""
    g, name = golden("dflash_window"), "dflash_window"
    block, states = g["block_ids"], g["target_hidden"]
    causal = golden_draft(
        name, tmp_path / "causal", layer={"is_causal": True}, sliding_window_non_causal=False
    )
    assert close(causal.draft(block, states).last_hidden_state, g["causal_output_hidden"])
    # Only a DSpark draft can say that some layers are causal; this one has the same layers.
    path = in_format(
        name,
        tmp_path / "mixed",
        layer={"is_causal": None},
        speculators_model_type="dspark",
        sliding_window_non_causal=False,
        markov_rank=2,
        markov_head_type="vanilla",
        enable_confidence_head=False,
        confidence_head_with_markov=False,
        sample_from_anchor=False,
    )
    tensors = load_file(path / "model.safetensors")
    heads = {f"markov_head.markov_w{n}.weight": torch.randn(320, 2) for n in (1, 2)}
    save_file(tensors | heads, path / "model.safetensors", metadata={"format": "pt"})
    mixed = lend(load_draft(path), g)
    assert mixed.attention == ((True, 5), (False, None), (True, 5))
    assert close(mixed.draft(block, states).last_hidden_state, g["mixed_output_hidden"])
    reference = reference_of(mixed)
    outputs = reference(g["embed_tokens.weight"][block[0]], states[0])
    assert close(outputs, g["mixed_output_hidden"][0])


def reordered(name: str, tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head so that the pairs that RoPE turns are neighbours; or a norm's weights."""
    if not name.endswith(("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")):
        return tensor
    rows = tensor.unflatten(0, (heads, 2, -1)) if "proj" in name else tensor.view(1, 2, -1)
    return rows.transpose(1, 2).flatten(0, 2).contiguous()


@torch.inference_mode()
def test_interleaved_rope(tmp_path: Path) -> None:
    """With the channels of each head reordered, the other style of RoPE computes the same."""
    g = golden("dflash_full")
    path = in_format("dflash_full", tmp_path / "draft", layer={"is_neox_style": False})
    tensors = load_file(path / "model.safetensors")
    changed = {
        name: reordered(name, tensor, 4 if "q_" in name else 2) for name, tensor in tensors.items()
    }
    save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
    draft = lend(load_draft(path), g)
    assert close(draft(g["block_ids"], g["target_hidden"]).logits, g["logits"])
    outputs = reference_of(draft)(
        g["embed_tokens.weight"][g["block_ids"][0]], g["target_hidden"][0]
    )
    assert close(outputs, g["output_hidden"][0])
    draft.save_pretrained(tmp_path / "saved")
    saved = stored_tensors(tmp_path / "saved")
    assert all(torch.equal(saved[name], changed[name]) for name in changed)
    assert saved.keys() == changed.keys()


@torch.inference_mode()
def test_scales_and_the_bound_of_logits(tmp_path: Path) -> None:
    g = golden("dflash2")
    draft = golden_draft(
        "dflash2",
        tmp_path / "draft",
        input_embedding_scale=2.5,
        output_multiplier=0.5,
        final_logit_softcapping=3.0,
    )
    halved = dict(g) | {"embed_tokens.weight": g["embed_tokens.weight"] / 2.5}
    output = lend(draft, halved)(g["block_ids"], g["target_hidden"])
    assert close(output.last_hidden_state, g["output_hidden"])
    assert close(output.logits, 3 * torch.tanh(g["logits"] / 2 / 3))
    reference = reference_of(draft)
    assert close(reference.logits(g["output_hidden"][0, 1:], g["lm_head.weight"]), output.logits[0])
    embedded = halved["embed_tokens.weight"][g["block_ids"][0]]
    assert close(reference(embedded, g["target_hidden"][0]), g["output_hidden"][0])


@pytest.mark.parametrize("form", ["vector", "entry"])
@torch.inference_mode()
def test_the_mask_has_an_embedding_of_its_own(form: str, tmp_path: Path) -> None:
    g, name = golden("dflash_full"), "dflash_full"
    path = in_format(name, tmp_path / "draft", mask_embedding=True)
    vector = g["embed_tokens.weight"][319].clone()
    held = {"embedding": vector[None], "mask_token_id": 319} if form == "entry" else vector
    torch.save(held, path / "mask_embedding.pt")
    g["embed_tokens.weight"][319] = 7.0
    draft = lend(load_draft(path), g)
    assert close(draft(g["block_ids"], g["target_hidden"]).logits, g["logits"])
    torch.save(vector[:-1].clone(), path / "mask_embedding.pt")
    with pytest.raises(FormatError, match="does not hold an embedding of 64 values"):
        load_draft(path)
    draft.save_pretrained(tmp_path / "saved")
    again = lend(load_draft(tmp_path / "saved", dtype="bfloat16"), g)
    assert again.mask_embedding.dtype == torch.bfloat16
    assert torch.equal(again.mask_embedding, vector.bfloat16())
    assert "mask_embedding" not in stored_tensors(tmp_path / "saved")


def test_what_belongs_to_a_draft_is_uploaded() -> None:
    assert {name for family in families() for name in family.companions} <= set(SAVED)


@torch.inference_mode()
def test_it_may_have_an_embedding_and_a_head_of_its_own(tmp_path: Path, log: list[str]) -> None:
    g = golden("dflash_full")
    path = in_format("dflash_full", tmp_path / "draft")
    own = {name: g[name] for name in ("embed_tokens.weight", "lm_head.weight")}
    tensors = load_file(path / "model.safetensors") | own
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    draft: Any = load_draft(path, verifier=VERIFIER)
    assert not [line for line in log if line.startswith("WARNING")]
    assert close(draft(g["block_ids"], g["target_hidden"]).logits, g["logits"])
    draft.save_pretrained(tmp_path / "saved")
    assert stored_tensors(tmp_path / "saved").keys() == tensors.keys()


@every_golden
def test_it_is_saved_as_it_was_converted(
    converted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    draft_of(converted, name).save_pretrained(tmp_path)
    assert config_of(tmp_path) == config_of(converted[name])
    saved, before_it = stored_tensors(tmp_path), stored_tensors(converted[name])
    assert saved.keys() == before_it.keys()
    assert all(torch.equal(saved[key], before_it[key]) for key in before_it)
    config = type(load_draft(tmp_path)).config_class.from_pretrained(tmp_path)
    assert config.to_dict() == config_of(tmp_path)


@every_golden
def test_a_directory_of_upstreams_is_loaded(
    converted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """One whose config says only what upstream's does."""
    g, draft = golden(name), golden_draft(name, tmp_path / "draft")
    with torch.inference_mode():
        output = draft.draft(g["block_ids"], g["target_hidden"])
    assert close(output.last_hidden_state, g["output_hidden"])
    assert draft.verifier_layers == draft_of(converted, name).verifier_layers == (2, 4, 6)


def test_its_vocabulary(converted: dict[str, Path]) -> None:
    draft, stored = draft_of(converted, "dspark"), stored_tensors(converted["dspark"])
    assert torch.equal(draft.d2t, stored["d2t"])
    assert torch.equal(draft.t2d.nonzero()[:, 0], draft.to_verifier(torch.arange(200)))
    assert draft.verifier_vocab_size == 320
    cast: Any = load_draft(converted["dspark"], dtype=torch.bfloat16)
    assert (cast.fc.weight.dtype, cast.d2t.dtype) == (torch.bfloat16, torch.int64)
    g = golden("dspark")
    lent = dict(g) | {name: g[name].bfloat16() for name in g if name.endswith("weight")}
    output = lend(cast, lent)(g["block_ids"], g["target_hidden"], tokens_before=before(g))
    assert output.logits.dtype == torch.bfloat16
    assert largest_difference(output.logits, g["conditioned_logits"]) < 0.5


def test_how_many_tokens_it_proposes(converted: dict[str, Path]) -> None:
    draft = draft_of(converted, "dflash_full")
    opened = open_converted(converted["dflash_full"])
    for proposal in (None, "greedy", "sampling"):
        assert draft.proposal_method(proposal).speculative_tokens == 7
        assert draft.proposal_method(proposal, 3).speculative_tokens == 3
        assert proposals_of(opened, proposal, [None, 3]) == [
            draft.proposal_method(proposal),
            draft.proposal_method(proposal, 3),
        ]
    with pytest.raises(GenerationError, match=r"drafts up to 7 tokens in a block, not 8"):
        proposals_of(opened, None, [8])
    method = ProposalMethod(proposal_type="sampling", speculative_tokens=2)
    assert draft.proposal_method(method) == method
    config = DFlashSpeculatorConfig(
        transformer_layer_config={"model_type": "qwen3"},
        block_size=4,
        aux_hidden_state_layer_ids=[1],
        mask_token_id=5,
    )
    methods = config.checked().speculators_config.proposal_methods
    assert [method.speculative_tokens for method in methods] == [3]


@torch.inference_mode()
def test_what_a_call_refuses(converted: dict[str, Path], tmp_path: Path) -> None:
    g, draft = golden("dflash_full"), draft_of(converted, "dflash_full")
    with pytest.raises(ValueError, match="holds its context only"):
        draft(g["block_ids"], g["target_hidden"], cache=DynamicCache())
    bare: Any = load_draft(in_format("dflash_full", tmp_path / "bare"))
    with pytest.raises(VerifierError, match="no head"):
        bare(g["block_ids"], g["target_hidden"])
    with pytest.raises(ValueError, match="Flash Attention"):
        load_draft(converted["dflash_full"], attn_implementation="flash_attention_2")
    narrow = in_format("dflash_full", tmp_path / "narrow", target_hidden_size=48)
    tensors = load_file(narrow / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:, :144].contiguous()
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"no embedding of its own.*48 \(target_hidden_size\)"):
        load_draft(narrow)
    rnn = draft_of(converted, "dspark_rnn")
    rnn.confidence_head = None
    with pytest.raises(FormatError, match="no confidence head"):
        rnn.confidence(torch.zeros(1, 1, 64), torch.zeros(1, 1, dtype=torch.long))


def test_it_can_be_trained(converted: dict[str, Path]) -> None:
    g = golden("dflash2")
    draft = draft_of(converted, "dflash2").train()
    output = draft(g["block_ids"], g["target_hidden"], tokens_before=before(g))
    loss = nn.functional.cross_entropy(output.logits[0], g["proposed_tokens"][0])
    loss.backward()
    missing = [
        name
        for name, parameter in draft.named_parameters()
        if parameter.grad is None and not name.startswith("borrowed_")
    ]
    assert missing == []


WRONG: dict[str, tuple[str, str]] = {
    "a layer": ("layers.0.mlp.up_proj.weight", "not what the source's tensors compute"),
    "the context": ("hidden_norm.weight", "not what the source's tensors compute"),
    "the selector": ("candidate_selector.successor_codebook", "those before it"),
    "the gate": ("markov_head.gate_proj.bias", "those before it"),
    "the confidence": ("confidence_head.proj.bias", "confidence in tokens"),
}


@pytest.mark.parametrize("part", WRONG)
def test_validation_finds_a_model_that_computes_otherwise(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, message = WRONG[part]
    name = "dflash2" if "selector" in changed else "dspark_gated"
    model = CLASSES[name.split("_", maxsplit=1)[0]]
    as_loaded = model.from_converted.__func__  # type: ignore[attr-defined]

    def damaged(cls: Any, *arguments: Any, **named: Any) -> Any:
        draft = as_loaded(cls, *arguments, **named)
        with torch.no_grad():
            draft.get_parameter(changed).mul_(1.5)
        return draft

    monkeypatch.setattr(model, "from_converted", classmethod(damaged))
    with pytest.raises(ValidationError, match=message):
        convert_golden(name, tmp_path)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("causal", [True, False])
def test_validation_finds_a_block_that_sees_too_much(
    causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that see the whole block, or none of it ahead, where the config says otherwise."""
    native = json.loads((GOLDEN_FAMILIES / "dflash_full" / "config.json").read_text())
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(native | {"is_causal": causal}))
    shutil.copy(GOLDEN_FAMILIES / "dflash_full" / "model.safetensors", source)
    initialised = DFlashSpeculator.__init__

    def misread(self: Any, *arguments: Any, **named: Any) -> None:
        initialised(self, *arguments, **named)
        self.attention = tuple((not causal, window) for _, window in self.attention)

    monkeypatch.setattr(DFlashSpeculator, "__init__", misread)
    with pytest.raises(ValidationError, match="not causal" if causal else "not what the source"):
        convert(source, tmp_path / "out", VERIFIER)
