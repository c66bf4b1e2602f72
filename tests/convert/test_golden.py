"""Converted checkpoints compute what the reference implementation computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (
    GOLDEN_NAMES,
    HIDDEN,
    PLAIN,
    TOLERANCE,
    VOCABULARY,
    golden_vectors,
    largest_difference,
    save_quietly,
    source_config,
    source_tensors,
    tiny_llama,
    write_checkpoint,
)
from plain_draft import plain_draft
from speculators.convert.eagle import EagleConverter
from speculators.models.eagle import EagleOutput, EagleSpeculator

every_golden = pytest.mark.parametrize("name", GOLDEN_NAMES)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
MASKED = [name for name in GOLDEN_NAMES if "attention_mask" in golden_vectors(name)]
LONG = [name for name in GOLDEN_NAMES if "long_input_ids" in golden_vectors(name)]


def load(converted: dict[str, Path], name: str, attention: str = "sdpa") -> EagleSpeculator:
    return EagleSpeculator.from_pretrained(converted[name], attn_implementation=attention)


def run(model: EagleSpeculator, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Return the hidden output and the logits."""
    with torch.inference_mode():
        output = model(*args, **kwargs)
    assert isinstance(output, EagleOutput)
    assert output.last_hidden_state is not None
    assert output.logits is not None
    return output.last_hidden_state, output.logits


@every_golden
def test_every_golden_folder_has_vectors_of_order_one(name: str) -> None:
    g = golden_vectors(name)
    assert g["output_hidden"].shape == (2, 24, HIDDEN)
    assert g["logits"].shape == (2, 24, VOCABULARY)
    assert 1 < g["output_hidden"].abs().max() < 100
    assert g["output_hidden"].std(dim=(0, 1)).min() > 0.1


@every_golden
@every_attention
def test_output_and_logits_are_the_references(
    converted: dict[str, Path], name: str, attention: str
) -> None:
    g = golden_vectors(name)
    model = load(converted, name, attention)
    assert model.config._attn_implementation == attention
    assert model.config.layer._attn_implementation == attention

    hidden, logits = run(model, g["input_ids"], g["hidden_states"])

    assert hidden.dtype == logits.dtype == torch.float32
    assert largest_difference(hidden, g["output_hidden"]) < TOLERANCE
    assert largest_difference(logits, g["logits"]) < TOLERANCE


@pytest.mark.parametrize("name", LONG)
@every_attention
def test_a_longer_sequence_gives_the_references_output(
    converted: dict[str, Path], name: str, attention: str
) -> None:
    g = golden_vectors(name)
    hidden, logits = run(
        load(converted, name, attention), g["long_input_ids"], g["long_hidden_states"]
    )
    assert largest_difference(hidden, g["long_output_hidden"]) < TOLERANCE
    expected = g["long_output_hidden"] @ g["lm_head.weight"].T
    assert largest_difference(logits, expected) < 2 * TOLERANCE


@every_golden
def test_a_tuple_on_request(converted: dict[str, Path], name: str) -> None:
    g = golden_vectors(name)
    with torch.inference_mode():
        output = load(converted, name)(g["input_ids"], g["hidden_states"], return_dict=False)
    assert isinstance(output, tuple)
    logits, hidden = output
    assert largest_difference(logits, g["logits"]) < TOLERANCE
    assert largest_difference(hidden, g["output_hidden"]) < TOLERANCE


@every_golden
@every_attention
@pytest.mark.parametrize("filler", [0.0, 50.0])
def test_left_padded_rows_of_one_batch_compute_as_if_alone(
    converted: dict[str, Path], name: str, attention: str, filler: float
) -> None:
    """Attention is causal, so a prefix of a golden sequence has a prefix of the golden output."""
    g = golden_vectors(name)
    ids, states, lengths = g["input_ids"], g["hidden_states"], (24, 11, 1, 17)
    batch_ids = torch.full((len(lengths), 24), 7)
    batch_states = torch.full((len(lengths), 24, HIDDEN), filler)
    mask = torch.zeros(len(lengths), 24, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch_ids[row, 24 - length :] = ids[row % 2, :length]
        batch_states[row, 24 - length :] = states[row % 2, :length]
        mask[row, 24 - length :] = 1

    hidden, logits = run(load(converted, name, attention), batch_ids, batch_states, mask)

    assert hidden.isfinite().all()
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        expected = g["output_hidden"][row % 2, :length]
        assert largest_difference(hidden[row, 24 - length :], expected) < TOLERANCE
        expected = g["logits"][row % 2, :length]
        assert largest_difference(logits[row, 24 - length :], expected) < TOLERANCE


@pytest.mark.parametrize("name", MASKED)
@every_attention
def test_the_golden_mask_hides_the_padding(
    converted: dict[str, Path], name: str, attention: str
) -> None:
    """The golden outputs were computed without a mask; with it, the second row starts later."""
    g = golden_vectors(name)
    padding = int((g["attention_mask"][1] == 0).sum())
    assert padding > 0
    hidden, logits = run(
        load(converted, name, attention), g["input_ids"], g["hidden_states"], g["attention_mask"]
    )
    assert largest_difference(hidden[0], g["output_hidden"][0]) < TOLERANCE
    assert largest_difference(logits[0], g["logits"][0]) < TOLERANCE
    alone = plain_draft(
        source_tensors(name),
        source_config(name),
        g["input_ids"][1, padding:],
        g["hidden_states"][1, padding:],
    )
    assert largest_difference(hidden[1, padding:], alone) < TOLERANCE
    # and it matters:
    assert largest_difference(hidden[1, padding:], g["output_hidden"][1, padding:]) > 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_causal_without_a_mask(converted: dict[str, Path], attention: str) -> None:
    model = EagleSpeculator.from_pretrained(converted[PLAIN], attn_implementation=attention)
    g = golden_vectors(PLAIN)
    ids, states = g["input_ids"].clone(), g["hidden_states"].clone()
    before = model(ids, states).logits
    ids[:, 12:] = 5
    states[:, 12:] = 100.0
    after = model(ids, states).logits
    assert largest_difference(after[:, :12], before[:, :12]) < TOLERANCE
    assert largest_difference(after[:, 12:], before[:, 12:]) > 1


ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 500000.0},
    "no theta": {"rope_theta": None},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic, within": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, beyond": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 1000,
    },
    "as transformers 5 writes it": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 70000.0},
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_the_draft_runs_with_its_own_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Compare over 2048 positions, with a verifier that has another RoPE."""
    scaled = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
    verifier = save_quietly(tiny_llama(rope_parameters=scaled), tmp_path / "verifier")
    config = {"max_position_embeddings": 2048, **rope}
    source = write_checkpoint(tmp_path / "source", config=config)
    model = EagleSpeculator.from_pretrained(
        EagleConverter().convert(source, tmp_path / "out", verifier)
    )

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2048,), generator=generator)
    states = torch.randn(2048, HIDDEN, generator=generator)
    known = {k: v for k, v in (source_config() | config).items() if v is not None}
    known = known | {k: v for k, v in known.get("rope_parameters", {}).items() if k == "rope_theta"}
    expected = plain_draft(source_tensors(), known, ids, states)
    with torch.inference_mode():
        found = model(ids[None], states[None]).last_hidden_state[0]
    # Angles up to 2048 are off by 2048 * 2**-24 in float32, and the error propagates.
    assert largest_difference(found, expected) < 5e-3
    assert (found.double() - expected).abs().mean() < TOLERANCE
    wrong = plain_draft(
        source_tensors(),
        known | {"rope_theta": 77.0, "rope_scaling": None},
        ids[:256],
        states[:256],
    )
    assert largest_difference(found[:256], wrong) > 1


@every_golden
def test_our_own_plain_evaluation_agrees_with_the_reference(name: str) -> None:
    """Other tests rely on this evaluation, so it is compared with the golden vectors, too."""
    g = golden_vectors(name)
    for row in range(2):
        hidden = plain_draft(
            source_tensors(name), source_config(name), g["input_ids"][row], g["hidden_states"][row]
        )
        assert largest_difference(hidden, g["output_hidden"][row]) < TOLERANCE


@every_golden
@every_attention
@pytest.mark.parametrize(
    "steps",
    [[1] * 24, [10, *[1] * 14], [5, 7, 12], [23, 1]],
    ids=["token by token", "prompt and tokens", "chunks", "prompt and a token"],
)
def test_steps_through_the_cache_equal_one_pass(
    converted: dict[str, Path], name: str, attention: str, steps: list[int]
) -> None:
    g = golden_vectors(name)
    model = load(converted, name, attention)
    cache, hidden, logits, at = None, [], [], 0
    for step in steps:
        part = slice(at, at + step)
        with torch.inference_mode():
            output = model(
                g["input_ids"][:, part],
                g["hidden_states"][:, part],
                past_key_values=cache,
                use_cache=True,
            )
        cache, at = output.past_key_values, at + step
        assert cache.get_seq_length() == at
        hidden.append(output.last_hidden_state)
        logits.append(output.logits)
    assert largest_difference(torch.cat(hidden, 1), g["output_hidden"]) < TOLERANCE
    assert largest_difference(torch.cat(logits, 1), g["logits"]) < TOLERANCE


@every_golden
def test_steps_through_the_cache_with_left_padding(converted: dict[str, Path], name: str) -> None:
    g = golden_vectors(name)
    padding, model, cache, hidden = 6, load(converted, name), None, []
    ids = torch.cat([torch.full((1, padding), 3), g["input_ids"][1:, : 24 - padding]], 1)
    states = torch.cat(
        [torch.full((1, padding, HIDDEN), 9.0), g["hidden_states"][1:, : 24 - padding]], 1
    )
    mask = (torch.arange(24) >= padding).long()[None]
    for part in (slice(0, 10), slice(10, 11), slice(11, 20), *(slice(i, i + 1) for i in (20, 21))):
        with torch.inference_mode():
            output = model(
                ids[:, part],
                states[:, part],
                attention_mask=mask[:, : part.stop],
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        hidden.append(output.last_hidden_state)
    found = torch.cat(hidden, 1)[0, padding:]
    assert largest_difference(found, g["output_hidden"][1, : len(found)]) < TOLERANCE


@every_golden
def test_no_cache_unless_asked_for(converted: dict[str, Path], name: str) -> None:
    g = golden_vectors(name)
    output = load(converted, name)(g["input_ids"], g["hidden_states"])
    assert output.past_key_values is None


@every_golden
def test_given_position_ids_are_used(converted: dict[str, Path], name: str) -> None:
    """RoPE is relative: shifting all positions changes nothing, changing distances does."""
    g = golden_vectors(name)
    model = load(converted, name)
    positions = torch.arange(24)[None].expand(2, -1)
    shifted, _ = run(model, g["input_ids"], g["hidden_states"], position_ids=positions + 40)
    assert largest_difference(shifted, g["output_hidden"]) < TOLERANCE
    spread, _ = run(model, g["input_ids"], g["hidden_states"], position_ids=positions * 3)
    assert largest_difference(spread, g["output_hidden"]) > 0.01


@every_golden
@every_attention
def test_a_mask_of_four_dimensions_is_used_as_it_is(
    converted: dict[str, Path], name: str, attention: str
) -> None:
    g = golden_vectors(name)
    model = load(converted, name, attention)
    causal = torch.ones(24, 24).tril() == 1
    if attention == "eager":  # which adds the mask
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(24, 24).masked_fill(~causal, lowest)
    else:
        mask = causal
    hidden, _ = run(model, g["input_ids"], g["hidden_states"], mask[None, None])
    assert largest_difference(hidden, g["output_hidden"]) < TOLERANCE


@every_golden
def test_logits_of_the_last_positions_alone(converted: dict[str, Path], name: str) -> None:
    g = golden_vectors(name)
    hidden, logits = run(
        load(converted, name), g["input_ids"], g["hidden_states"], logits_to_keep=3
    )
    assert hidden.shape == (2, 24, HIDDEN)
    assert logits.shape == (2, 3, VOCABULARY)
    assert largest_difference(logits, g["logits"][:, -3:]) < TOLERANCE


@every_golden
@every_attention
def test_bfloat16_stays_within_its_rounding(
    converted: dict[str, Path], name: str, attention: str
) -> None:
    """Bfloat16 keeps 8 bits: each rounding errs by up to 2**-9 of a value.

    There are some ten roundings between input and output, with independent errors. 2**-5 of the
    largest value leaves room for their sum, and a wrong computation is off by about 1.
    """
    g = golden_vectors(name)
    model = EagleSpeculator.from_pretrained(
        converted[name], dtype=torch.bfloat16, attn_implementation=attention
    )
    hidden, logits = run(model, g["input_ids"], g["hidden_states"])
    assert hidden.dtype == logits.dtype == torch.bfloat16
    for found, expected in ((hidden, g["output_hidden"]), (logits, g["logits"])):
        assert largest_difference(found, expected) < 2**-5 * expected.abs().max()
        assert largest_difference(found, expected) > 0  # it was really bfloat16


@every_golden
def test_one_sequence_alone_equals_its_row(converted: dict[str, Path], name: str) -> None:
    g = golden_vectors(name)
    model = load(converted, name)
    for row in range(2):
        one = slice(row, row + 1)
        hidden, _ = run(model, g["input_ids"][one], g["hidden_states"][one])
        assert largest_difference(hidden, g["output_hidden"][one]) < TOLERANCE
