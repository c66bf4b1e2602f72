"""What a draft returns: by name, key and position, and its cache by either name."""

import copy
import logging
import pickle
import subprocess
import sys
import warnings
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from helpers import PLAIN, golden_vectors, largest_difference
from speculators.models.eagle import EagleOutput, EagleSpeculator
from speculators.models.output import DraftOutput

NAMES = ("cache", "past_key_values")

every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def model(converted: dict[str, Path]) -> EagleSpeculator:
    return EagleSpeculator.from_pretrained(converted[PLAIN])


def test_an_output_by_name_key_and_position(model: EagleSpeculator) -> None:
    g = golden_vectors(PLAIN)
    output = model(g["input_ids"], g["hidden_states"], use_cache=True)
    assert isinstance(output, DraftOutput)
    assert list(output.keys()) == ["logits", "last_hidden_state", "cache"]
    assert output["logits"] is output.logits is output[0]
    assert output["last_hidden_state"] is output.last_hidden_state is output[1]
    assert output["cache"] is output.cache is output[2]
    assert output.cache.get_seq_length() == 24
    assert output.to_tuple() == tuple(output.values()) == output[:]


def test_the_older_name_of_the_output() -> None:
    assert EagleOutput is DraftOutput


def outputs_with(cache: DynamicCache | None) -> dict[str, DraftOutput]:
    """The same output, made in every way."""
    state = torch.zeros(1, 2, 3)
    set_later, by_key = (DraftOutput(last_hidden_state=state) for _ in range(2))
    set_later.past_key_values = cache  # type: ignore[misc]
    by_key["past_key_values"] = cache
    made = DraftOutput(None, state, cache)
    return {
        "by position": made,
        "by keyword": DraftOutput(last_hidden_state=state, cache=cache),
        "by the older keyword": DraftOutput(last_hidden_state=state, past_key_values=cache),
        "set as an attribute": set_later,
        "set as a key": by_key,
        "copied": copy.copy(made),
    }


@pytest.mark.parametrize("way", outputs_with(None))
def test_the_cache_has_two_names_however_it_was_given(way: str) -> None:
    cache = DynamicCache()
    output = outputs_with(cache)[way]
    assert list(output.keys()) == ["last_hidden_state", "cache"]
    assert output.to_tuple()[1] is output[1] is cache
    for name in NAMES:
        assert getattr(output, name) is output[name] is output.get(name) is cache
        assert name in output


@every_name
def test_an_output_without_a_cache(name: str) -> None:
    output = DraftOutput(logits=torch.zeros(1))
    assert getattr(output, name) is None
    assert name not in output
    assert output.get(name, 7) == 7
    assert output.to_tuple() == (output.logits,)
    with pytest.raises(KeyError):
        output[name]


def test_an_output_survives_pickle_and_pytrees() -> None:
    cache = DynamicCache()
    output = DraftOutput(last_hidden_state=torch.ones(1, 2, 3), cache=cache)
    again = pickle.loads(pickle.dumps(output))
    assert largest_difference(again.last_hidden_state, torch.ones(1, 2, 3)) == 0
    assert isinstance(again.past_key_values, DynamicCache)
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    rebuilt = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(rebuilt, DraftOutput)
    assert rebuilt.past_key_values is cache


def test_a_cache_given_by_both_names_is_an_error(model: EagleSpeculator) -> None:
    cache, g = DynamicCache(), golden_vectors(PLAIN)
    with pytest.raises(ValueError, match="give only one"):
        DraftOutput(cache=cache, past_key_values=cache)
    with pytest.raises(ValueError, match="give only one"):
        model(g["input_ids"], g["hidden_states"], cache=cache, past_key_values=cache)


@every_name
def test_forward_takes_the_cache_by_either_name(model: EagleSpeculator, name: str) -> None:
    g = golden_vectors(PLAIN)
    first = model(g["input_ids"][:, :20], g["hidden_states"][:, :20], use_cache=True)
    rest = model(g["input_ids"][:, 20:], g["hidden_states"][:, 20:], **{name: first.cache})
    assert rest.cache is first.cache
    assert rest.cache.get_seq_length() == 24
    assert largest_difference(rest.logits, g["logits"][:, 20:]) < 1e-4


NOTICES = """
import sys, warnings
warnings.filterwarnings("error", message=".*deprecated")
import torch
import transformers
from transformers.utils import logging
from speculators.models.eagle import EagleSpeculator
from speculators.models.output import DraftOutput
logging.disable_progress_bar()
model = EagleSpeculator.from_pretrained(sys.argv[1], verifier=sys.argv[2])
tokens = torch.tensor([[1, 2, 3]])
for name in ("cache", "past_key_values"):
    output = model(tokens, torch.zeros(1, 3, 64), use_cache=True)
    output = model(tokens, torch.zeros(1, 3, 64), **{name: output[name]})
    DraftOutput(**{name: getattr(output, name)})
for proposal in ("greedy", "dynamic_tree"):
    for prompts in (tokens, tokens.repeat(2, 1)):
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            proposal=proposal,
            max_new_tokens=4,
        )
print("done")
"""


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_no_notice_of_deprecation(
    converted: dict[str, Path], verifier: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """Neither a warning nor a line of transformers' log, whichever name is used.

    Exhaustive: in a process of its own, which says each of them for the first time.
    """
    if alone:
        done = subprocess.run(
            [sys.executable, "-c", NOTICES, converted[PLAIN], verifier],
            check=False,
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
        return
    told: SimpleQueue[Any] = SimpleQueue()
    handler = QueueHandler(told)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    transformers.utils.logging.warning_once.cache_clear()
    monkeypatch.setattr(sys, "argv", ["", str(converted[PLAIN]), str(verifier)])
    try:
        with warnings.catch_warnings():
            exec(NOTICES, {"__name__": "__main__"})
    finally:
        logger.removeHandler(handler)
    assert told.empty()
