"""What a draft is told to be used for instead: each wrong call ends in one sentence."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, pipeline
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from eagle3 import TARGET
from helpers import HIDDEN, PLAIN, VOCABULARY
from speculators.errors import GenerationError, InputError, VerifierError
from speculators.models import load_draft
from speculators.models.eagle import EagleSpeculator

IDS = torch.tensor([[1, 2, 3]])
STATES = torch.zeros(1, 3, HIDDEN)


@pytest.fixture(scope="module")
def draft(converted: dict[str, Path]) -> EagleSpeculator:
    return EagleSpeculator.from_pretrained(converted[PLAIN], verifier="auto")


make_pipeline: Any = pipeline


def told(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# The verifier


def test_the_verifier_that_the_config_names(draft: EagleSpeculator, verifier: Path) -> None:
    named = draft.config.speculators.verifier.name_or_path
    assert isinstance(draft.verifier, LlamaForCausalLM)
    assert draft.verifier.name_or_path == named == str(verifier)


def test_a_config_that_names_none(converted: dict[str, Path], tmp_path: Path) -> None:
    model = EagleSpeculator.from_pretrained(converted[PLAIN])
    reference = model.config.speculators
    reference.verifier.name_or_path = None
    model.config.speculators_config = reference.model_dump()
    model.save_pretrained(tmp_path)
    with pytest.raises(VerifierError) as error:
        EagleSpeculator.from_pretrained(tmp_path, verifier="auto")
    assert "names no verifier: give the model that" in told(error)


def test_the_complete_call_is_shown(converted: dict[str, Path], verifier: Path) -> None:
    """The calls in the message work as they stand."""
    alone = EagleSpeculator.from_pretrained(converted[PLAIN])
    with pytest.raises(VerifierError) as error:
        alone.generate(IDS)
    text = told(error)
    assert f"draft.attach_verifier({str(verifier)!r})" in text
    call = text[text.index("EagleSpeculator.from_pretrained") :]
    loaded = eval(call, {"EagleSpeculator": EagleSpeculator})
    assert loaded.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] <= 5


# transformers' own ways


def test_a_draft_is_no_assistant(draft: EagleSpeculator, verifier: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(verifier)
    with pytest.raises(GenerationError) as error:
        model.generate(IDS, assistant_model=draft, max_new_tokens=4, do_sample=False)
    assert "draft.attach_verifier(verifier); draft.generate(**inputs)" in told(error)
    draft.attach_verifier(model)
    assert isinstance(draft.generate(input_ids=IDS, max_new_tokens=2, do_sample=False), Tensor)
    assert copy.deepcopy(draft).config.to_dict() == draft.config.to_dict()


def test_a_draft_is_no_pipeline(draft: EagleSpeculator) -> None:
    with pytest.raises(GenerationError) as error:
        make_pipeline("text-generation", model=draft, tokenizer=PreTrainedTokenizerBase())
    assert "call EagleSpeculator.generate" in told(error)
    assert draft.can_generate() is False


def test_auto_classes_do_not_know_drafts(converted: dict[str, Path]) -> None:
    """As docs/generation.md says; if they do one day, the page has to be changed."""
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="Should have a `model_type` key"):
            auto.from_pretrained(converted[PLAIN])


# Inputs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"labels": IDS}, ["computes no loss from labels"]),
        ({"hidden_states": STATES[..., :60]}, ["(1, 3, 60)", "(1, 3, 64)"]),
        ({"hidden_states": torch.zeros(1, 4, HIDDEN)}, ["(1, 4, 64)", "(1, 3, 64)"]),
        ({"hidden_states": torch.zeros(2, 3, HIDDEN)}, ["(2, 3, 64)", "(1, 3, 64)"]),
        ({"hidden_states": STATES[0]}, ["(3, 64)", "(1, 3, 64)"]),
        ({"hidden_states": "states"}, ["has to be a tensor, not a str"]),
        ({"hidden_states": None}, ["Give either hidden_states"]),
        ({"hidden_states": None, "draft_states": STATES[..., 1:]}, ["(1, 3, 63)", "(1, 3, 64)"]),
        ({"attention_mask": torch.ones(1, 5)}, ["(1, 5)", "(1, 3)"]),
        ({"input_ids": IDS[0]}, ["(3)", "(batch, length)"]),
        ({"input_ids": IDS[:, :0], "hidden_states": STATES[:, :0]}, ["(1, 0)", "no token"]),
        ({"input_ids": IDS.float()}, ["torch.float32"]),
        ({"input_ids": "text"}, ["token ids, not text"]),
        ({"input_ids": [[1, 2, 3]]}, ["has to be a tensor of token ids, not a list"]),
    ],
    ids=lambda it: " ".join(it) if isinstance(it, list | dict) else None,
)
def test_what_forward_does_not_take(
    draft: EagleSpeculator, arguments: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        draft(**({"input_ids": IDS, "hidden_states": STATES} | arguments))
    assert all(it in told(error) for it in expected)


def test_a_mask_covers_the_cache_too(draft: EagleSpeculator) -> None:
    first = draft(IDS, STATES, use_cache=True)
    with pytest.raises(InputError) as error:
        draft(IDS, STATES, attention_mask=torch.ones(1, 3), cache=first.cache)
    assert "(1, 3)" in told(error)
    assert "(1, 6)" in told(error)
    draft(IDS, STATES, attention_mask=torch.ones(1, 6), cache=first.cache)


@pytest.mark.parametrize("name", ["eagle31_specforge", "peagle_speculators"])
def test_drafts_that_read_several_states(eagle3_drafts: dict[str, Path], name: str) -> None:
    draft = load_draft(eagle3_drafts[name], verifier=TARGET)
    assert draft.verifier is not None
    width = len(draft.verifier_layers) * draft.verifier.config.hidden_size
    draft(IDS, torch.zeros(1, 3, width))
    several = {"num_draft_tokens": 2} if name == "peagle_speculators" else {}
    with pytest.raises(InputError) as error:
        draft(IDS, torch.zeros(1, 3, width - 8), **several)
    assert f"(1, 3, {width - 8})" in told(error)
    assert f"(1, 3, {width})" in told(error)


@pytest.mark.parametrize(
    ("input_ids", "arguments", "expected"),
    [
        ("text", {}, ["generate(**tokenizer(text, return_tensors='pt'))"]),
        ({"input_ids": IDS}, {}, ["generate(**inputs)"]),
        ([[1, 2]], {}, ["not a list"]),
        (IDS[0], {}, ["(3)", "input_ids[None]"]),
        (IDS[:, :0], {}, ["(1, 0)", "no token"]),
        (torch.tensor([[1, VOCABULARY]]), {}, [str(VOCABULARY), "tokenizer"]),
        (torch.tensor([[1, -1]]), {}, ["-1", str(VOCABULARY)]),
        (IDS, {"attention_mask": torch.ones(1, 5)}, ["(1, 5)", "(1, 3)"]),
    ],
)
def test_what_generate_does_not_take(
    draft: EagleSpeculator, input_ids: Any, arguments: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        draft.generate(input_ids, **arguments)
    assert all(it in told(error) for it in expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"proposal": "gredy"}, "Unknown proposal type 'gredy' (did you mean 'greedy'?)"),
        ({"proposal": 3}, "A proposal is one of greedy, sampling, "),
        ({"num_draft_tokens": 0}, "0 is not a number of tokens to draft: Input should be greater"),
    ],
)
def test_proposals_that_are_not_there(
    draft: EagleSpeculator, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(GenerationError) as error:
        draft.generate(IDS, **arguments)
    assert told(error).startswith(expected)
