"""What must hold in every supported release of vLLM: with a tiny verifier, which starts fast."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import drafts
from processes import ENVIRONMENT, IN_ONE_PROCESS, LENGTH, Outcomes, engine, run
from simulation import simulate
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
}
"""Drafts by how they differ from the first."""

PROMPTS = [[7919 * i + 104729 * j for j in range(8)] for i in range(16)]

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
def prompts() -> list[list[int]]:
    return [[token % 49152 for token in prompt] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def eager(
    tmp_path_factory: pytest.TempPathFactory,
    verifier: Path,
    converted: dict[str, Path],
    prompts: list[list[int]],
) -> Outcomes:
    """What vLLM does without compiling anything."""
    engines = {name: engine(draft, model=str(verifier)) for name, draft in converted.items()}
    engines["without"] = engine(verifier, model=str(verifier)) | {"speculative_config": None}
    outcomes = run(tmp_path_factory.mktemp("eager") / "result", prompts, engines)
    assert not outcomes.refused
    return outcomes


def test_speculation_changes_nothing_that_is_said(eager: Outcomes) -> None:
    for name in CHANGES:
        assert eager.answers[name].tokens == eager.answers["without"].tokens, name


@pytest.mark.parametrize("name", CHANGES)
def test_as_much_is_accepted_as_of_our_own_model(
    verifier: Path, converted: dict[str, Path], prompts: list[list[int]], eager: Outcomes, name: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    draft = EagleSpeculator.from_pretrained(converted[name], verifier=model, dtype=torch.float32)
    answers = eager.answers[name]
    ours = simulate(draft, model, prompts, answers.tokens, LENGTH)
    assert answers.acceptance_length == pytest.approx(ours.acceptance_length, abs=0.02)


def test_every_draft_drafts_otherwise(eager: Outcomes) -> None:
    """Otherwise the tests below would prove nothing."""
    counters = [(answer.drafts, *answer.accepted) for answer in eager.answers.values()]
    assert len(set(counters)) == len(counters)


def keys(verifier: Path, converted: list[Path]) -> list[str]:
    """The keys of vLLM's compile cache for drafts that lie at one path, one after another."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("keys.py"), verifier, *converted],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **IN_ONE_PROCESS},
    )
    return done.stdout.split()


def test_no_two_drafts_share_compiled_graphs(verifier: Path, converted: dict[str, Path]) -> None:
    first, *others, again = keys(verifier, [*converted.values(), converted["every feature"]])
    assert len({first, *others}) == len(CHANGES)
    assert again == first


@pytest.mark.skipif("VLLM_COMPILED" not in os.environ, reason="takes minutes")
def test_drafts_with_one_cache_directory(
    tmp_path: Path,
    verifier: Path,
    converted: dict[str, Path],
    prompts: list[list[int]],
    eager: Outcomes,
) -> None:
    """Compiled graphs go from one process to the next; each draft gets its own."""
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    for name in ("every feature", "another rms_norm_eps", "without fc.bias", "every feature"):
        compiled = engine(converted[name], model=str(verifier), enforce_eager=False)
        outcomes = run(tmp_path / "result", prompts, {name: compiled}, cache)
        assert outcomes.answers[name] == eager.answers[name]
