"""Values of a config.json that have another form than their key, and those that are null."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dflash import GOLDEN_FAMILIES
from eagle3 import GOLDEN3
from helpers import GOLDEN, PLAIN
from speculators.checkpoint.reader import Checkpoint, read_checkpoint
from speculators.checkpoint.repository import open_repository
from speculators.convert.plan import DraftPlan, family_of, plan_draft
from speculators.errors import ConversionError
from speculators.families.recognition import recognise

DRAFTS = {
    "EAGLE": GOLDEN / PLAIN,
    "EAGLE-3": GOLDEN3 / "qwen3_specforge",
    "EAGLE-3, without t2d": GOLDEN3 / "modelopt_4aux",
    "EAGLE-3, upstream's": GOLDEN3 / "speculators_qwen3_2layer",
    "P-EAGLE": GOLDEN3 / "peagle_speculators",
    "DFlash": GOLDEN_FAMILIES / "dflash_window",
    "DSpark": GOLDEN_FAMILIES / "dspark_gated",
}

KEYS = [
    *("architectures", "layer_types", "rope_parameters", "rope_scaling", "rope_theta"),
    *("eagle_config", "dflash_config", "speculators_config", "transformer_layer_config"),
    *("hidden_size", "head_dim", "vocab_size", "num_hidden_layers", "num_attention_heads"),
    *("partial_rotary_factor", "mask_token_id", "draft_vocab_size", "target_hidden_size"),
    *("exported_zeros", "block_size", "hidden_act", "rms_norm_eps", "num_aux_hidden_states"),
]

ODD: list[Any] = ["x", -1, 0, 10**30, 1.5, True, [], [[1]], ["x"], {}, {"x": [1]}]
ODD += [{"rope_type": [1]}, {"rope_theta": [1]}, {"proposal_methods": 1}]

DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def opened(draft: str) -> Checkpoint:
    return read_checkpoint(open_repository(DRAFTS[draft]))


def plan(checkpoint: Checkpoint, **keys: Any) -> DraftPlan:
    """The plan with other keys, at the top or in the config of upstream's layer."""
    config = json.loads(json.dumps(checkpoint.config))
    inner = config.get("transformer_layer_config")
    for key, value in keys.items():
        within = inner if inner is not None and key in inner else config
        within[key] = value
    changed = replace(checkpoint, config=config)
    return plan_draft(family_of(changed, recognise(config, changed.tensors)), changed)


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_form_is_read_or_refused(draft: str) -> None:
    """Another exception than that of a refusal would be no sentence to a user."""
    checkpoint = opened(draft)
    sentences = list[str]()
    for key in KEYS:
        for value in ODD:
            try:
                plan(checkpoint, **{key: value})
            except ConversionError as error:
                sentences.append(str(error))
    assert len(sentences) > len(KEYS)
    assert all("\n" not in it for it in sentences)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rope_scaling", "linear", "'linear' is not a JSON object"),
        (
            "rope_parameters",
            {"rope_type": [1]},
            r"rope_parameters.rope_type: \[1\] is not a single",
        ),
        ("architectures", 1, "1 is not a list of words"),
        ("hidden_size", [64], r"\[64\] is not a single value"),
        ("num_hidden_layers", "1", "says num_hidden_layers '1'"),
        ("vocab_size", 10**30, "which no model has"),
    ],
)
def test_the_key_is_named(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConversionError, match=expected):
        plan(opened("EAGLE-3, without t2d"), **{key: value})


@pytest.mark.parametrize("draft", ["EAGLE", "EAGLE-3", "EAGLE-3, upstream's", "DFlash"])
def test_null_says_as_little_as_no_key(draft: str) -> None:
    found = plan(opened(draft), **dict.fromkeys([*DEFAULTS, "num_hidden_layers"]))
    layer = found.derived.layer
    assert {key: getattr(layer, key) for key in DEFAULTS} == DEFAULTS | (
        {"max_position_embeddings": 32768} if draft == "DFlash" else {}
    )
    assert layer.num_hidden_layers == plan(opened(draft)).derived.layer.num_hidden_layers


@pytest.mark.parametrize("draft", ["EAGLE", "EAGLE-3", "DFlash"])
def test_key_value_heads_that_are_not_given_are_those_of_the_tensors(draft: str) -> None:
    """The reference takes those of the queries, which would not fit."""
    given = plan(opened(draft)).derived.layer.num_key_value_heads
    found = plan(opened(draft), num_key_value_heads=None)
    assert found.derived.layer.num_key_value_heads == given == 2
    assert any("gives no num_key_value_heads" in it for it in found.derived.discrepancies)


def test_a_token_may_be_null() -> None:
    """That says that there is none."""
    assert plan(opened("EAGLE"), eos_token_id=None).derived.layer.eos_token_id is None


@pytest.mark.parametrize("draft", ["EAGLE-3", "DFlash"])
def test_a_number_in_a_name_is_not_counted_up_to(draft: str) -> None:
    """A small file must not ask for large work."""
    checkpoint = opened(draft)
    name = "layers.99999999999.input_layernorm.weight"
    info = replace(checkpoint.tensors[next(iter(checkpoint.tensors))], name=name)
    large = replace(checkpoint, tensors={**checkpoint.tensors, name: info})
    with pytest.raises(ConversionError, match=r"has unknown layers\.99999999999"):
        plan(large)
