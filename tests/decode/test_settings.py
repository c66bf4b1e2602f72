"""What speculation refuses, and the proposal methods that the format describes."""

import json
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.logits_process import SynthIDTextWatermarkLogitsProcessor
from transformers.generation.streamers import TextStreamer

from helpers import PLAIN, config_of, save_quietly
from speculators.decode import Draft, Generation, speculate
from speculators.errors import FormatError, GenerationError, VerifierError
from speculators.families.converted import parse_config
from speculators.format.config import PROPOSALS, ProposalMethod
from speculators.models.eagle import EagleSpeculator
from tiny_models import SIZES, knowing_draft, prompt, random_draft, tiny_verifier


@pytest.fixture(scope="module")
def verifier() -> PreTrainedModel:
    return tiny_verifier()


@pytest.fixture(scope="module")
def draft(verifier: PreTrainedModel) -> EagleSpeculator:
    return knowing_draft(verifier)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beam search": ({"num_beams": 2}, "is greedy or samples; for beam search, call"),
    "contrastive search": (
        {"penalty_alpha": 0.6, "top_k": 4},
        "is greedy or samples; for contrastive search, call",
    ),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "for assisted generation, call"),
    "scores": ({"output_scores": True}, "with output_scores=True; leave it out"),
    "logits": ({"output_logits": True}, "output_logits=True"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states=True"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "a static cache": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "a chunked prefill": ({"prefill_chunk_size": 4}, "prefill_chunk_size=4"),
    "guidance": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    "a watermark with a state": (
        {
            "logits_processor": LogitsProcessorList(
                [SynthIDTextWatermarkLogitsProcessor(5, [1, 2], 64, 0, 8, torch.device("cpu"))]
            )
        },
        "SynthIDTextWatermarkLogitsProcessor",
    ),
    "a cache of one's own": ({"past_key_values": DynamicCache()}, "with past_key_values"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 4, 32)}, "with inputs_embeds"),
    "another assistant": ({"assistant_model": "one"}, "with assistant_model"),
    "right padding": ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "pad the prompts on the l"),
    "an unknown proposal": ({"proposal": "tea leaves"}, "Unknown proposal type 'tea leaves'"),
    "another static tree": (
        {"proposal": "static_tree", "num_draft_tokens": 9},
        "static tree has 25 tokens, not 9",
    ),
    "a dynamic tree that is too large": (
        {
            "proposal": ProposalMethod(
                proposal_type="dynamic_tree", speculative_tokens=40, tree_depth=2, tree_top_k=4
            )
        },
        "has 36 candidates, too few for 40",
    ),
    "more children than tokens": (
        {
            "proposal": ProposalMethod(
                proposal_type="dynamic_tree", speculative_tokens=40, tree_top_k=49
            )
        },
        "tree_top_k 49 is more than the 48 tokens",
    ),
    "a lossy acceptance": (
        {"proposal": ProposalMethod(verifier_accept_k=3)},
        "With verifier_accept_k 3 the output would not be the verifier's",
    ),
    "a lossy tolerance": (
        {"proposal": ProposalMethod(accept_tolerance=0.5)},
        r"With accept_tolerance 0\.5 the output would not be the verifier's",
    ),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_exactly_is_refused(
    draft: EagleSpeculator, verifier: PreTrainedModel, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(GenerationError, match=words):
        draft.generate(prompt(4), max_new_tokens=4, **settings)
    assert not verifier._forward_hooks


def test_a_setting_that_transformers_does_not_know_is_refused(draft: EagleSpeculator) -> None:
    with pytest.raises(ValueError, match="tempest"):
        draft.generate(prompt(4), max_new_tokens=4, tempest=1)


class Told(TextStreamer):
    def __init__(self) -> None:
        pass

    def put(self, value: Tensor) -> None:
        pass


FOR_ONE: dict[str, tuple[dict[str, Any], str]] = {
    "a streamer": ({"streamer": Told()}, "with a streamer takes one prompt"),
    "allowed tokens by prompt": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [row + 1]},
        "PrefixConstrainedLogitsProcessor takes one prompt",
    ),
    "a criterion and no end": ({"max_time": 100.0}, "need an eos_token_id"),
}


@pytest.mark.parametrize(("settings", "words"), FOR_ONE.values(), ids=FOR_ONE.keys())
def test_what_takes_one_prompt_at_a_time(
    draft: EagleSpeculator, verifier: PreTrainedModel, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(GenerationError, match=words):
        draft.generate(prompt(4, rows=2), max_new_tokens=4, **settings)
    if "streamer" not in settings:
        found = draft.generate(prompt(4), max_new_tokens=4, **settings)
        expected = verifier.generate(prompt(4), max_new_tokens=4, **settings)  # type: ignore[operator]
        assert torch.equal(found, expected)  # type: ignore[arg-type]


def test_a_verifier_is_needed(draft: EagleSpeculator) -> None:
    alone = EagleSpeculator(draft.config)
    with pytest.raises(VerifierError, match="Attach the verifier first"):
        alone.generate(prompt(4))


# Verifiers


def other_verifier(name: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**SIZES, "num_hidden_layers": 4, "initializer_range": 0.4, **config}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **settings)
    )
    model.train(False)
    return model


OTHERS: dict[str, dict[str, Any]] = {
    # Positions are learned, and there are just enough for the prompt and the output.
    "gpt2": {"max_position_embeddings": 32},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    # Layers of two kinds, and a function that changes the logits after the head.
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0},
}


@pytest.mark.parametrize(("name", "config"), OTHERS.items(), ids=OTHERS.keys())
@pytest.mark.parametrize("proposal", ["greedy", "static_tree", "dynamic_tree"])
def test_other_verifiers(name: str, config: dict[str, Any], proposal: str) -> None:
    verifier = other_verifier(name, **config)
    ids = prompt(8)
    expected = verifier.generate(ids, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    draft = random_draft(verifier)
    found = draft.generate(ids, max_new_tokens=24, do_sample=False, proposal=proposal)
    assert torch.equal(found, expected)  # type: ignore[arg-type]


REFUSED_VERIFIERS: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_head": 4}, "BloomForCausalLM: its forward takes no position_ids"),
    "mamba": ({}, "MambaForCausalLM: its state cannot be rolled back"),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"] * 2},
        # transformers 5.13 calls it stateful, and 5.24 does not.
        "Lfm2ForCausalLM: (its state cannot be rolled back|it has layers of type 'conv')",
    ),
}


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [(name, *rest) for name, rest in REFUSED_VERIFIERS.items()],
    ids=REFUSED_VERIFIERS.keys(),
)
def test_verifiers_that_speculation_could_spoil(
    name: str, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(GenerationError, match=words):
        random_draft(other_verifier(name, **config)).generate(prompt(4), max_new_tokens=4)


def test_an_attention_that_takes_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for flash attention, which cannot be tested here: chains work without masks."""
    monkeypatch.setattr("speculators.decode.verification.MASKABLE", ("eager",))
    verifier = tiny_verifier()
    draft = knowing_draft(verifier)
    with pytest.raises(
        GenerationError, match=r"masks, which the attention implementation 'sdpa' does not take"
    ):
        draft.generate(prompt(4), max_new_tokens=4, proposal="static_tree")
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    with pytest.raises(GenerationError, match=r"attn_implementation='eager'"):
        draft.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=4)
    found = draft.generate(prompt(4), max_new_tokens=9)
    assert torch.equal(found, verifier.generate(prompt(4), max_new_tokens=9))  # type: ignore[arg-type, operator]


# Stop strings


def test_stop_strings(verifier: PreTrainedModel, draft: EagleSpeculator) -> None:
    letters = {letter: i for i, letter in enumerate(string.ascii_letters[:48])}
    fast = Tokenizer(BPE(letters, []))
    fast.pre_tokenizer, fast.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    ids = prompt(6, seed=0)
    plain = verifier.generate(ids, max_new_tokens=30, do_sample=False)  # type: ignore[operator]
    stop = tokenizer.decode(plain[0, 15:17])
    settings: dict[str, Any] = {
        "stop_strings": [stop],
        "tokenizer": tokenizer,
        "max_new_tokens": 30,
        "do_sample": False,
    }
    expected = verifier.generate(ids, **settings)  # type: ignore[operator]
    assert expected.shape[1] < plain.shape[1]
    for proposal in ("greedy", "dynamic_tree"):
        assert torch.equal(draft.generate(ids, proposal=proposal, **settings), expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer"):
        draft.generate(ids, stop_strings=[stop], max_new_tokens=30)


# The format


def test_a_proposal_has_the_sizes_of_its_type() -> None:
    assert ProposalMethod().model_dump(exclude_none=True) == {
        "proposal_type": "greedy",
        "speculative_tokens": 5,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    for name, sizes in PROPOSALS.items():
        written = ProposalMethod(proposal_type=name).model_dump(exclude_none=True)
        assert written.items() >= sizes.items()
        assert ProposalMethod.model_validate(written) == ProposalMethod(proposal_type=name)
    assert ProposalMethod(proposal_type="dynamic_tree").speculative_tokens == 59


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"proposal_type": "greedy", "tree_depth": 3}, "greedy has no tree_depth"),
        ({"proposal_type": "static_tree", "tree_top_k": 3}, "static_tree has no tree_top_k"),
        ({"proposal_type": "dynamic_tree", "tree_depth": 0}, "greater than or equal to 1"),
        ({"speculative_tokens": 0}, "greater than or equal to 1"),
        ({"speculative_tokens": "many"}, "valid integer"),
    ],
)
def test_a_proposal_that_makes_no_sense(
    converted: dict[str, Path], method: dict[str, Any], words: str
) -> None:
    config = config_of(converted[PLAIN])
    config["speculators_config"]["proposal_methods"].append(method)
    with pytest.raises(FormatError, match=r"proposal_methods\.1.*" + words):
        parse_config(config, "here")


def test_proposals_are_written_and_read(
    tmp_path: Path, verifier: PreTrainedModel, draft: EagleSpeculator
) -> None:
    tree = {
        "proposal_type": "dynamic_tree",
        "speculative_tokens": 12,
        "tree_depth": 3,
        "tree_top_k": 4,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    chain = {
        "proposal_type": "greedy",
        "speculative_tokens": 2,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    draft.config.speculators_config = {
        "algorithm": "eagle",
        "proposal_methods": [chain, tree],
        "default_proposal_method": "dynamic_tree",
        "verifier": {"name_or_path": None, "architectures": ["LlamaForCausalLM"]},
    }
    try:
        saved = save_quietly(draft, tmp_path / "saved")
    finally:
        draft.config.speculators_config = None
    stored = json.loads((saved / "config.json").read_text())["speculators_config"]
    assert stored["proposal_methods"] == [chain, tree]

    again = EagleSpeculator.from_pretrained(saved, verifier=verifier)
    assert again.proposal_method() == ProposalMethod.model_validate(tree)
    assert again.proposal_method("greedy") == ProposalMethod.model_validate(chain)
    assert again.proposal_method("sampling") == ProposalMethod(proposal_type="sampling")
    assert again.proposal_method(num_draft_tokens=7).speculative_tokens == 7

    def offered(**settings: Any) -> set[int]:
        result = again.generate(
            prompt(5), max_new_tokens=12, return_dict_in_generate=True, **settings
        )
        assert isinstance(result, Generation)
        return set(result.offered[0])

    assert offered(proposal="greedy") == {2}
    assert offered(proposal="greedy", num_draft_tokens=4) == {4}
    assert max(offered()) <= 4


def test_decoding_needs_no_model_of_ours(verifier: PreTrainedModel, draft: EagleSpeculator) -> None:
    """Any object with the members of the protocol will do."""
    names = "device dtype verifier_layers verifier_vocab_size project draft logits to_verifier"
    bare = SimpleNamespace(**{name: getattr(draft, name) for name in names.split()})
    proposal = ProposalMethod()
    result = speculate(cast(Draft, bare), verifier, prompt(5), proposal=proposal, max_new_tokens=9)
    assert torch.equal(result.sequences, verifier.generate(prompt(5), max_new_tokens=9))  # type: ignore[operator]
    del bare.project
    with pytest.raises(GenerationError, match="SimpleNamespace is not a draft: it lacks"):
        speculate(cast(Draft, bare), verifier, prompt(5), proposal=proposal, max_new_tokens=9)
