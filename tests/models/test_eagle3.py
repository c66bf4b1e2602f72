"""EAGLE-3, EAGLE-3.1 and P-EAGLE drafts as models: golden vectors, caches, batches, saving."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3 import (
    CHAINS,
    GOLDEN3,
    NAMES,
    PARALLEL,
    TARGET,
    convert_golden3,
    golden3,
    reference_of,
)
from helpers import TOLERANCE, config_of, largest_difference, stored_tensors
from speculators.errors import FormatError, VerifierError
from speculators.models import load_draft
from speculators.models.eagle3 import Eagle3Speculator, Eagle3SpeculatorConfig, PEagleSpeculator

STEPS = 4
every_golden = pytest.mark.parametrize("name", NAMES)
every_chain = pytest.mark.parametrize("name", CHAINS)


def draft_of(path: Path) -> Any:
    return load_draft(path, dtype="float32")


def close(found: Tensor | None, expected: Tensor) -> bool:
    assert found is not None
    return largest_difference(found, expected) < TOLERANCE


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of unequal length, (length, ...), as one tensor, and its mask."""
    longest = max(map(len, rows))
    padded = torch.stack(
        [torch.cat((row.new_ones(longest - len(row), *row.shape[1:]), row)) for row in rows]
    )
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return padded, mask


def test_every_folder_is_there() -> None:
    assert len(NAMES) == 12


@every_chain
@torch.inference_mode()
def test_it_computes_the_prefix(eagle3_drafts: dict[str, Path], name: str) -> None:
    g, draft = golden3(name), draft_of(eagle3_drafts[name])
    assert close(draft.project(g["aux_hidden"]), g["fc_out"])
    output = draft(input_ids=g["input_ids"][:, 1:], hidden_states=g["aux_hidden"])
    assert close(output.logits, g["prefix_logits"])
    last = g["prefix_prenorm"]
    assert close(output.last_hidden_state, draft.norm(last) if draft.config.norm_output else last)


@every_chain
@torch.inference_mode()
def test_it_drafts_a_chain(eagle3_drafts: dict[str, Path], name: str) -> None:
    g, draft = golden3(name), draft_of(eagle3_drafts[name])
    output = draft(g["input_ids"][:, 1:], g["aux_hidden"], use_cache=True)
    for step in range(STEPS):
        state = output.last_hidden_state[:, -1:]
        assert close(output.logits[0, -1], g["chain_logits"][step])
        assert close(state[0, 0], g["chain_feedback"][step])
        token = draft.to_verifier(output.logits[:, -1:].argmax(-1))
        assert token.item() == g["chain_target_ids"][step]
        output = draft(token, draft_states=state, past_key_values=output.past_key_values)


@every_chain
@torch.inference_mode()
def test_rows_of_a_padded_batch_do_not_see_padding(
    eagle3_drafts: dict[str, Path], name: str
) -> None:
    g, draft = golden3(name), draft_of(eagle3_drafts[name])
    ids, states = g["input_ids"][0, 1:], g["aux_hidden"][0]
    padded_ids, mask = left_padded([ids, ids[:5], ids[3:]])
    padded_states, _ = left_padded([states, states[:5], states[3:]])
    output = draft(padded_ids, padded_states, attention_mask=mask, use_cache=True)
    assert close(output.logits[:1], g["prefix_logits"])
    assert close(output.logits[1, -5:], g["prefix_logits"][0, :5])
    alone = draft(ids[None, 3:], states[None, 3:]).logits
    assert close(output.logits[2:, -9:], alone)
    # The first row drafts on as if it were alone.
    later = draft(
        g["chain_target_ids"][:1].expand(3, 1),
        draft_states=output.last_hidden_state[:, -1:],
        attention_mask=torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), 1),
        past_key_values=output.past_key_values,
    )
    assert close(later.logits[0, 0], g["chain_logits"][1])


@every_chain
@torch.inference_mode()
def test_the_reference_computes_the_same(eagle3_drafts: dict[str, Path], name: str) -> None:
    g, draft = golden3(name), draft_of(eagle3_drafts[name])
    embedding, reference = draft.get_input_embeddings(), reference_of(draft)
    assert reference.cannot_evaluate() is None
    states = reference.project(g["aux_hidden"][0])
    assert close(states, g["fc_out"][0])
    tokens = g["input_ids"][0, 1:]
    for step in range(STEPS):
        drafted = reference.recur(embedding(tokens), states)
        if step == 0:
            assert close(reference.logits(drafted), g["prefix_logits"][0])
        assert close(drafted[-1], g["chain_feedback"][step])
        assert close(reference.logits(drafted[-1]), g["chain_logits"][step])
        tokens = torch.cat((tokens, g["chain_target_ids"][step : step + 1]))
        states = torch.cat((states, drafted[-1:]))


@torch.inference_mode()
def test_norm_output_in_its_other_meaning(tmp_path: Path) -> None:
    """What SpecForge 0.2.0 itself computes: the state before the norm is fed back."""
    name = "eagle31_specforge"
    g, draft = golden3(name), draft_of(convert_golden3(name, tmp_path, norm_output="head-only"))
    output = draft(g["input_ids"][:, 1:], g["aux_hidden"], use_cache=True)
    for step in range(STEPS):
        state = output.last_hidden_state[:, -1:]
        assert close(output.logits[0, -1], g["specforge_chain_logits"][step])
        assert close(state[0, 0], g["specforge_chain_prenorm"][step])
        token = draft.to_verifier(output.logits[:, -1:].argmax(-1))
        assert token.item() == g["specforge_chain_target_ids"][step]
        output = draft(token, draft_states=state, past_key_values=output.past_key_values)


@torch.inference_mode()
def test_a_parallel_draft_drafts_in_one_pass(eagle3_drafts: dict[str, Path]) -> None:
    g, draft = golden3(PARALLEL), draft_of(eagle3_drafts[PARALLEL])
    assert isinstance(draft, PEagleSpeculator)
    ids, states = g["input_ids"][:, 1:], g["aux_hidden"]
    output = draft(input_ids=ids, hidden_states=states, num_draft_tokens=STEPS)
    assert isinstance(output.last_hidden_state, Tensor)
    assert close(output.logits, g["parallel_logits"][None])
    assert close(output.last_hidden_state, g["parallel_prenorm"])
    assert isinstance(output.logits, Tensor)
    drafted = output.logits[0].argmax(-1)
    assert drafted.tolist() == g["parallel_draft_ids"].tolist()
    assert draft.to_verifier(drafted).tolist() == g["parallel_target_ids"].tolist()
    masked = draft.mask_state().expand(1, STEPS - 1, -1)
    assert close(torch.cat((draft.project(states), masked), 1), g["fc_out"])
    # In a padded batch, and at positions that begin elsewhere, which RoPE does not see.
    padded_ids, mask = left_padded([ids[0], ids[0, 4:]])
    padded_states, _ = left_padded([states[0], states[0, 4:]])
    positions = torch.arange(7, 7 + 12).expand(2, -1)
    output = draft(
        padded_ids, padded_states, mask, positions, num_draft_tokens=STEPS, use_cache=True
    )
    assert close(output.logits[:1], g["parallel_logits"][None])
    alone = draft(ids[:, 4:], states[:, 4:], num_draft_tokens=STEPS)
    assert close(output.logits[1:], alone.logits)
    # Through the cache: the masks are cropped, and the pass goes on from real positions.
    begun = draft(ids[:, :7], states[:, :7], num_draft_tokens=STEPS, use_cache=True)
    assert begun.past_key_values is not None
    begun.past_key_values.crop(1 - STEPS)  # newer releases take no absolute length
    output = draft(
        ids[:, 7:], states[:, 7:], past_key_values=begun.past_key_values, num_draft_tokens=STEPS
    )
    assert close(output.logits, g["parallel_logits"][None])


@torch.inference_mode()
def test_the_reference_drafts_in_one_pass(eagle3_drafts: dict[str, Path]) -> None:
    g, draft = golden3(PARALLEL), draft_of(eagle3_drafts[PARALLEL])
    embedding: Any = draft.get_input_embeddings()
    logits = reference_of(draft).slots(
        embedding(g["input_ids"][0, 1:]),
        g["aux_hidden"][0],
        embedding.weight[draft.config.mask_token_id],
        STEPS,
    )
    assert close(logits, g["parallel_logits"])


def test_states_are_told_by_their_argument(eagle3_drafts: dict[str, Path]) -> None:
    g, draft = golden3("sailab_llama"), draft_of(eagle3_drafts["sailab_llama"])
    ids, states = g["input_ids"][:, 1:], g["aux_hidden"]
    fed_back = draft(ids, states).last_hidden_state
    for given in ({}, {"hidden_states": states, "draft_states": fed_back}):
        with pytest.raises(ValueError, match=r"either hidden_states, .* or draft_states"):
            draft(input_ids=ids, **given)
    parallel = draft_of(eagle3_drafts[PARALLEL])
    with pytest.raises(ValueError, match="takes the verifier's hidden_states"):
        parallel(input_ids=ids, draft_states=fed_back, num_draft_tokens=2)


@every_golden
def test_its_vocabularies_and_layers(eagle3_drafts: dict[str, Path], name: str) -> None:
    draft, stored = draft_of(eagle3_drafts[name]), stored_tensors(eagle3_drafts[name])
    reduced = "d2t" in stored
    assert (draft.d2t is not None) == reduced == (name != "fullvocab")
    drafted = draft.to_verifier(torch.arange(draft.config.draft_vocab_size))
    assert drafted.unique().shape == drafted.shape
    if reduced:
        assert torch.equal(draft.d2t, stored["d2t"])
        assert torch.equal(draft.t2d.nonzero()[:, 0], drafted)
    layers = {"norm_before_fc": (4, 6, 8), "modelopt_4aux": (2, 4, 5, 7)}
    assert draft.verifier_layers == layers.get(name, (2, 4, 5))
    assert draft.verifier_vocab_size == 320


@every_golden
def test_it_is_saved_as_it_was_converted(
    eagle3_drafts: dict[str, Path], tmp_path: Path, name: str
) -> None:
    draft_of(eagle3_drafts[name]).save_pretrained(tmp_path)
    assert config_of(tmp_path) == config_of(eagle3_drafts[name])
    saved, before = stored_tensors(tmp_path), stored_tensors(eagle3_drafts[name])
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[key], before[key]) for key in before)
    config = Eagle3SpeculatorConfig.from_pretrained(tmp_path)
    assert config.to_dict() == config_of(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_keep_their_types(eagle3_drafts: dict[str, Path], dtype: torch.dtype) -> None:
    draft: Any = load_draft(eagle3_drafts["qwen3_specforge"], dtype=dtype)
    assert (draft.fc.weight.dtype, draft.d2t.dtype, draft.t2d.dtype) == (
        dtype,
        torch.int64,
        torch.bool,
    )
    draft.float().to(dtype)
    assert draft.d2t.dtype == torch.int64
    g = golden3("qwen3_specforge")
    output = draft(g["input_ids"][:, 1:], g["aux_hidden"])
    assert output.logits.dtype == dtype
    assert largest_difference(output.logits.float(), g["prefix_logits"]) < 0.5


@pytest.mark.parametrize("name", ["norm_before_fc", "speculators_qwen3_2layer", PARALLEL])
@torch.inference_mode()
def test_upstreams_own_directory_is_loaded(tmp_path: Path, name: str) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN3 / name / file, tmp_path / file)
    g, draft = golden3(name), Eagle3Speculator.from_pretrained(tmp_path)
    more = {"num_draft_tokens": STEPS} if name == PARALLEL else {}
    output: Any = draft(g["input_ids"][:, 1:], g["aux_hidden"], **more)
    expected = g["parallel_logits"][None] if name == PARALLEL else g["prefix_logits"]
    assert close(output.logits, expected)


def test_a_draft_with_all_of_its_own_needs_no_verifier(
    eagle3_drafts: dict[str, Path], tmp_path: Path, log: list[str]
) -> None:
    def moved(name: str) -> Path:
        shutil.copytree(eagle3_drafts[name], tmp_path / name)
        config = config_of(tmp_path / name)
        config["speculators_config"]["verifier"]["name_or_path"] = str(tmp_path / "gone")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    g = golden3("qwen3_specforge")
    draft = draft_of(moved("qwen3_specforge"))
    assert close(draft(g["input_ids"][:, 1:], g["aux_hidden"]).logits, g["prefix_logits"])
    assert not [line for line in log if line.startswith("WARNING")]
    borrowing = draft_of(moved("sailab_llama"))
    assert [line for line in log if "gone does not exist" in line]
    g = golden3("sailab_llama")
    with pytest.raises(VerifierError, match="no embedding of its own"):
        borrowing(g["input_ids"][:, 1:], g["aux_hidden"])
    borrowing.attach_verifier(TARGET)
    assert close(borrowing(g["input_ids"][:, 1:], g["aux_hidden"]).logits, g["prefix_logits"])


def test_a_narrow_verifiers_embedding_is_not_borrowed(
    eagle3_drafts: dict[str, Path], tmp_path: Path
) -> None:
    source = eagle3_drafts["target_hidden_48"]
    shutil.copy(source / "config.json", tmp_path / "config.json")
    tensors = load_file(source / "model.safetensors")
    del tensors["embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"whose width is 48 \(target_hidden_size\), not 64"):
        load_draft(tmp_path)


def test_a_parallel_draft_has_a_class_of_its_own(eagle3_drafts: dict[str, Path]) -> None:
    config = Eagle3SpeculatorConfig.from_pretrained(eagle3_drafts[PARALLEL])
    assert config.architectures == ["PEagleDraftModel"]
    assert isinstance(PEagleSpeculator(config), Eagle3Speculator)
    with pytest.raises(FormatError, match="build a PEagleSpeculator"):
        Eagle3Speculator(config)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda it: it["d2t"].add_(1000), "the vocabulary has 320"),
        (lambda it: it["d2t"].sub_(1000), "tokens are not negative"),
        (lambda it: it.update(d2t=it["d2t"].flip(0)), "does not give ascending tokens"),
        (lambda it: it.update(t2d=it["t2d"].flip(0)), "name different tokens"),
    ],
)
def test_tables_that_name_other_tokens_are_refused(
    tmp_path: Path, eagle3_drafts: dict[str, Path], edit: Any, expected: str
) -> None:
    """They would propose wrong tokens, or none that there are."""
    shutil.copytree(eagle3_drafts["sailab_llama"], tmp_path / "out")
    tensors = stored_tensors(tmp_path / "out")
    edit(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(FormatError, match=expected):
        load_draft(tmp_path / "out")
