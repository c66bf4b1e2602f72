"""Converted EAGLE-3 and P-EAGLE drafts, served by vLLM as it is, without the plugin.

Two kinds of drafts: golden ones in the layouts of their publishers, which are random, so that what
they draft shows every mistake, but none of it is accepted; and two that often predict a tiny
verifier correctly, which show how much is accepted.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import drafts
from eagle3 import OPTIONS, knowing_eagle3
from helpers import config_of
from processes import LENGTH, MAX_TOKENS, WITHOUT_PLUGINS, Outcomes, run
from speculators.convert.conversion import convert
from speculators.convert.export import export
from speculators.evaluate.evaluation import Evaluation
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.evaluate.report import Settings
from speculators.evaluate.subject.loading import load_subject
from speculators.evaluate.subject.opening import open_draft
from speculators.models import load_draft

GOLDEN = Path(__file__).parent / "golden-eagle3"
TARGET = GOLDEN / "_target"
EXPECTED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "golden.json").read_text())
PARALLEL = "peagle_speculators"

PROMPTS = [golden["prompt"] for golden in EXPECTED.values()]
"""One of each golden draft, in order: every draft is served with all of them."""

ENGINE: dict[str, Any] = {
    # In bfloat16, rounding would decide between tokens that are almost equally likely.
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "disable_log_stats": False,
}

KNOWING: dict[str, dict[str, Any]] = {
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "P-EAGLE": {"parallel": True},
}
"""How the drafts differ that predict a verifier; both have two layers, with biases."""

DOUBT = 0.005
"""The scale of all else that they compute: so small that some of what they draft is right."""

torch.set_num_threads(1)

every_golden = pytest.mark.parametrize("name", EXPECTED)


def golden(directory: Path, **settings: Any) -> dict[str, Any]:
    """The arguments of an engine for the golden drafts' verifier, which has no tokenizer."""
    return ENGINE | {"model": str(directory), "skip_tokenizer_init": True} | settings


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden drafts, converted."""
    root = tmp_path_factory.mktemp("converted")
    return {
        name: convert(GOLDEN / name, root / name, TARGET, options=OPTIONS.get(name, {}))
        for name in EXPECTED
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, converted: dict[str, Path]) -> Outcomes:
    """What vLLM answers when it is given a converted draft, an exported one, or none.

    A converted draft is served by its directory alone: that names the verifier, the method and
    the number of tokens.
    """
    root = tmp_path_factory.mktemp("served")
    exported = {name: export(draft, root / name, "vllm") for name, draft in converted.items()}
    speculation = {"method": "eagle3", "num_speculative_tokens": LENGTH}
    engines = {
        "without": golden(TARGET),
        **{name: golden(draft) for name, draft in converted.items()},
        **{
            f"exported {name}": golden(
                TARGET,
                speculative_config=speculation
                | {"model": str(draft)}
                | ({"parallel_drafting": True} if name == PARALLEL else {}),
            )
            for name, draft in exported.items()
        },
    }
    outcomes = run(root / "result", PROMPTS, engines, WITHOUT_PLUGINS, max_tokens=10)
    assert not outcomes.refused
    return outcomes


@every_golden
def test_speculation_changes_nothing_that_is_said(served: Outcomes, name: str) -> None:
    for way in (name, f"exported {name}"):
        answers = served.answers[way]
        assert answers.tokens == served.answers["without"].tokens
        assert answers.drafts > len(PROMPTS)


@every_golden
def test_first_proposals_are_the_publishers_own(
    converted: dict[str, Path], served: Outcomes, name: str
) -> None:
    index = list(EXPECTED).index(name)
    for way in (name, f"exported {name}"):
        answers = served.answers[way]
        assert answers.tokens[index][0] == EXPECTED[name]["next"]
        expected = EXPECTED[name]["drafted"]
        first = answers.proposals[index][0]
        assert len(first) == (length_of(converted[name]) if way == name else LENGTH)
        assert first[:4] == expected[: len(first)]


@every_golden
def test_all_proposals_are_our_own_models(
    converted: dict[str, Path], served: Outcomes, name: str
) -> None:
    """Also for the prompts of other drafts, and after tokens that were not foreseen."""
    verifier: Any = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    draft = load_draft(converted[name], verifier=verifier, dtype="float32")
    answers, exported = served.answers[name], served.answers[f"exported {name}"]
    length = length_of(converted[name])
    accepted = [0] * length
    for row, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([prompt + answers.tokens[row]])
        states = states_of(verifier, tokens, draft.verifier_layers)
        settled = len(prompt) + 1  # the prompt's pass gives the first token
        for step, proposed in enumerate(answers.proposals[row]):
            if settled >= tokens.shape[1]:
                break
            ours = drafted_after(draft, tokens[:, :settled], states[:, : settled - 1], length)
            assert proposed == ours, (row, step)
            assert exported.proposals[row][step] == ours[:LENGTH], (row, step)
            follows = tokens[0, settled : settled + length].tolist()
            right = next((n for n, it in enumerate(ours) if [it] != follows[n : n + 1]), length)
            accepted[:right] = [count + 1 for count in accepted[:right]]
            settled += right + 1
    assert answers.accepted == accepted


def length_of(draft: Path) -> int:
    """How many tokens a converted draft says to draft at a time."""
    length: int = config_of(draft)["speculators_config"]["proposal_methods"][0][
        "speculative_tokens"
    ]
    return length


def states_of(verifier: Any, tokens: Tensor, layers: tuple[int, ...]) -> Tensor:
    """The states that enter a verifier's layers, (1, seq, layers · hidden), read by hooks."""
    entering: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
        for module in (*verifier.model.layers, verifier.model.norm)
    ]
    with torch.no_grad():
        verifier.model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.cat([entering[layer] for layer in layers], -1)


@torch.no_grad()
def drafted_after(draft: Any, tokens: Tensor, states: Tensor, length: int) -> list[int]:
    """What our own model drafts after some tokens, given the states of all but the last."""
    if draft.config.parallel:
        logits = draft(tokens[:, 1:], states, num_draft_tokens=length).logits
        slots: list[int] = draft.to_verifier(logits[0].argmax(-1)).tolist()
        return slots
    found: list[int] = []
    output = draft(tokens[:, 1:], states, use_cache=True)
    while True:
        token = draft.to_verifier(output.logits[:, -1:].argmax(-1))
        found.append(token.item())
        if len(found) == length:
            return found
        state = output.last_hidden_state[:, -1:]
        output = draft(token, draft_states=state, past_key_values=output.past_key_values)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Drafts that predict a tiny verifier, in directories that `save_pretrained` wrote."""
    root = tmp_path_factory.mktemp("knowing")
    verifier = drafts.tiny_verifier(root / "verifier")
    model = LlamaForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    for name, settings in KNOWING.items():
        speculation = {
            "algorithm": "peagle" if settings.get("parallel") else "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": LENGTH}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": str(verifier), "architectures": ["LlamaForCausalLM"]},
        }
        draft = knowing_eagle3(model, doubt=DOUBT, speculators_config=speculation, **settings)
        draft.save_pretrained(root / name)
    return {name: root / name for name in KNOWING}


@dataclass(frozen=True)
class Measured:
    """How many tokens a draft gives per pass."""

    here: float | None
    served: float


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, knowing: dict[str, Path]
) -> dict[str, Measured]:
    """The same prompts, answered in this process, and by vLLM with each of the drafts."""
    prompts = read_prompts(OWN_PROMPTS)[:8]
    settings = Settings(prompts_total=len(prompts), max_new_tokens=MAX_TOKENS, acceptance_only=True)
    here, tokens = {}, list[list[int]]()
    for name, draft in knowing.items():
        subject = load_subject(open_draft(draft), dtype="float32", device="cpu")
        chain = subject.draft.proposal_method(None, LENGTH)
        evaluation = Evaluation(subject, prompts, [chain], settings)
        assert len(list(evaluation.run())) == len(prompts)
        here[name] = evaluation.report().results[0].overall.acceptance_length
        tokens = [subject.verifier.encode(prompt) for prompt in prompts]
    engines = {name: ENGINE | {"model": str(draft)} for name, draft in knowing.items()}
    result = tmp_path_factory.mktemp("measured") / "result"
    outcomes = run(result, tokens, engines, WITHOUT_PLUGINS)
    assert not outcomes.refused
    return {
        name: Measured(here[name], outcomes.answers[name].acceptance_length) for name in knowing
    }


@pytest.mark.parametrize("name", KNOWING)
def test_as_much_is_accepted_as_evaluate_says(measured: dict[str, Measured], name: str) -> None:
    found = measured[name]
    assert found.served > 1.3
    assert found.served == pytest.approx(found.here, abs=0.05)
