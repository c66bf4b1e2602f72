"""What must hold in every supported release of vLLM: with a tiny verifier, which starts fast."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import drafts
from processes import ENVIRONMENT, IN_ONE_PROCESS, LENGTH, Outcomes, engine, run
from simulation import known, simulate
from speculators.convert.eagle import EagleConverter
from speculators.models.eagle import EagleSpeculator

CHANGES: dict[str, Mapping[str, object]] = {
    "every feature": {},
    "another rms_norm_eps": {"rms_norm_eps": 0.5},
    "another rope_theta": {"rope_theta": 10.0},
    "scaled RoPE": {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "without fc.bias": {"features": drafts.EVERY_FEATURE - {"fusion_bias"}},
    "without biases of attention": {"features": drafts.EVERY_FEATURE - {"attention_bias"}},
    "without layernorms": {"features": drafts.EVERY_FEATURE - {"layernorms"}},
    "without any feature": {"features": frozenset()},
}
"""Drafts by how they differ from the first."""

SERVED = ("every feature", "another rms_norm_eps", "scaled RoPE", "without any feature")

PROMPTS = [[(7919 * row + 104729 * column) % 49152 for column in range(8)] for row in range(16)]

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drafts.tiny_verifier(tmp_path_factory.mktemp("tiny") / "verifier")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, verifier: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafts")
    return {
        name: EagleConverter().convert(
            drafts.tiny_draft(root / f"published {name}", **change),  # type: ignore[arg-type]
            root / name,
            verifier,
        )
        for name, change in CHANGES.items()
    }


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, verifier: Path, converted: dict[str, Path]
) -> Outcomes:
    """What vLLM does with each of them, and without a draft."""
    engines = {name: engine(converted[name], model=str(verifier)) for name in SERVED}
    engines["without"] = engine(verifier, model=str(verifier)) | {"speculative_config": None}
    outcomes = run(tmp_path_factory.mktemp("served") / "result", PROMPTS, engines)
    assert not outcomes.refused
    return outcomes


def test_speculation_changes_nothing_that_is_said(served: Outcomes) -> None:
    for name in SERVED:
        assert served.answers[name].tokens == served.answers["without"].tokens, name


@pytest.mark.parametrize("name", SERVED)
def test_as_much_is_accepted_as_of_our_own_model(
    verifier: Path, converted: dict[str, Path], served: Outcomes, name: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    draft = EagleSpeculator.from_pretrained(converted[name], verifier=model, dtype=torch.float32)
    answers = served.answers[name]
    ours = simulate(draft, known(model, PROMPTS, answers.tokens, LENGTH), LENGTH)
    assert answers.acceptance_length == pytest.approx(ours.acceptance_length, abs=0.02)


def test_each_request_is_sampled_by_its_own_settings(
    tmp_path: Path, verifier: Path, converted: dict[str, Path], served: Outcomes
) -> None:
    """Of settings that leave one token, each gives the greedy answer; others are in the batch.

    vLLM itself samples by other numbers on CPUs
    (findings/vllm-0.32-samples-by-unwritten-memory-on-cpus.sh).
    """
    one = [{"temperature": 2.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}]
    others = [{"temperature": 1.0, "top_k": 50}, {"temperature": 0.7, "top_p": 0.9}]
    prompts = [prompt for prompt in PROMPTS[:4] for _ in (*one, *others)]
    engines = {"sampled": engine(converted["every feature"], model=str(verifier))}
    outcomes = run(tmp_path / "result", prompts, engines, sampling=(one + others) * 4)
    answers = outcomes.answers["sampled"].tokens
    for number, greedy in enumerate(served.answers["without"].tokens[:4]):
        assert answers[4 * number : 4 * number + 2] == [greedy, greedy]
    assert outcomes.answers["sampled"].acceptance_length > 1.2


def test_every_draft_drafts_otherwise(served: Outcomes) -> None:
    """Otherwise the tests above would prove little."""
    counters = [(answer.drafts, *answer.accepted) for answer in served.answers.values()]
    assert len(set(counters)) == len(counters)


def test_no_two_drafts_share_compiled_graphs(verifier: Path, converted: dict[str, Path]) -> None:
    """The plugin has no reason to warn in this release, either."""
    drafts_in_turn = [*converted.values(), converted["every feature"]]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("keys.py"), verifier, *drafts_in_turn],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **IN_ONE_PROCESS},
    )
    first, *others, again = json.loads(done.stdout.splitlines()[-1])
    assert len({first, *others}) == len(CHANGES)
    assert again == first
    assert "speculators plugin" not in done.stdout
