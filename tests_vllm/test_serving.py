"""Converted drafts in the real engine."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import drafts
from drafts import VARIANTS, VERIFIER
from processes import Answers, Server, Stopped, run_engine, serve, speculation
from simulation import simulate
from speculators.convert.eagle import EagleConverter
from speculators.convert.export import export
from speculators.models.eagle import EagleSpeculator

LENGTH = 3
QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "List three kinds of fruit.",
    "Why is the sky blue?",
    "Explain what a bicycle is to a child.",
    "Tell me a short story about a cat.",
    "How do I boil an egg?",
    "What does a baker do all day?",
    "Name the planets of the solar system.",
    "What is the sum of 12 and 30?",
    "Describe a forest in autumn.",
    "Give me advice on learning to swim.",
    "Who wrote Romeo and Juliet?",
    "What is the difference between rain and snow?",
    "Write a Python function that adds two numbers.",
    "How many legs does a spider have?",
)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True)
    tokens: list[list[int]] = encoded["input_ids"]
    return tokens


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A draft of every variant, as it would be published."""
    root = tmp_path_factory.mktemp("published")
    return {name: make(root / name) for name, make in VARIANTS.items()}


@pytest.fixture(scope="session")
def converted(
    tmp_path_factory: pytest.TempPathFactory, published: dict[str, Path]
) -> dict[str, Path]:
    """The same, converted."""
    root = tmp_path_factory.mktemp("converted")
    return {
        name: EagleConverter().convert(directory, root / name, VERIFIER)
        for name, directory in published.items()
    }


@pytest.fixture(scope="session")
def tiny_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drafts.tiny_verifier(tmp_path_factory.mktemp("tiny") / "verifier")


@pytest.fixture(scope="session")
def without(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> Answers:
    """What vLLM says without speculation."""
    answers = run_engine(prompts, tmp_path_factory.mktemp("without") / "result.json")
    assert isinstance(answers, Answers), answers.log
    return answers


@pytest.fixture(scope="session")
def with_draft(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[list[int]],
    converted: dict[str, Path],
) -> Callable[[str], Answers]:
    """What vLLM says with a variant's draft; asked once."""
    known: dict[str, Answers] = {}

    def answer(variant: str) -> Answers:
        if variant not in known:
            result = tmp_path_factory.mktemp(variant) / "result.json"
            answers = run_engine(prompts, result, **speculation(converted[variant], LENGTH))
            assert isinstance(answers, Answers), answers.log
            known[variant] = answers
        return known[variant]

    return answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_speculation_changes_nothing_that_is_said(
    without: Answers, with_draft: Callable[[str], Answers], variant: str
) -> None:
    answers = with_draft(variant)
    assert answers.tokens == without.tokens
    assert len(answers.tokens) >= 16
    assert answers.acceptance_length > 1.2  # it was the draft that drafted


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_much_is_accepted_as_of_our_own_model(
    prompts: list[list[int]],
    converted: dict[str, Path],
    with_draft: Callable[[str], Answers],
    variant: str,
) -> None:
    answers = with_draft(variant)
    verifier = LlamaForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)
    draft = EagleSpeculator.from_pretrained(
        converted[variant], verifier=verifier, dtype=torch.float32
    )
    ours = simulate(draft, verifier, prompts, answers.tokens, LENGTH)
    assert answers.acceptance_length == pytest.approx(ours.acceptance_length, abs=0.05)


def test_compiling_and_splitting_over_workers_changes_nothing(
    tmp_path: Path, prompts: list[list[int]], tiny_verifier: Path
) -> None:
    """One draft with every feature: eagerly on one worker, and compiled on two."""
    published = drafts.tiny_draft(tmp_path / "published")
    draft = EagleConverter().convert(published, tmp_path / "converted", tiny_verifier)
    engine = {"model": str(tiny_verifier), **speculation(draft, LENGTH)}
    once = run_engine(prompts, tmp_path / "once", **engine)
    again = run_engine(
        prompts, tmp_path / "again", tensor_parallel_size=2, enforce_eager=False, **engine
    )
    assert isinstance(once, Answers), once.log
    assert isinstance(again, Answers), again.log
    assert again == once
    assert sum(once.accepted) > 0


def test_an_exported_draft_is_served_without_the_plugin(
    tmp_path: Path,
    prompts: list[list[int]],
    converted: dict[str, Path],
    without: Answers,
    with_draft: Callable[[str], Answers],
) -> None:
    exported = export(converted["eagle1"], tmp_path / "exported", "vllm")
    answers = run_engine(prompts, tmp_path / "result", plugins="", **speculation(exported, LENGTH))
    assert isinstance(answers, Answers), answers.log
    assert answers.tokens == without.tokens
    assert answers.accepted == with_draft("eagle1").accepted


def test_without_the_plugin_a_converted_draft_is_not_known(
    tmp_path: Path, prompts: list[list[int]], converted: dict[str, Path]
) -> None:
    """Otherwise the tests above would show nothing."""
    stopped = run_engine(
        prompts, tmp_path / "result", plugins="", **speculation(converted["eagle1"])
    )
    assert isinstance(stopped, Stopped)
    assert "Expected one of" in stopped.log


def drop_a_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")


def cut_in_half(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop_a_tensor, "lacks layers.0.mlp.up_proj.weight, by its config.json"),
        (cut_in_half, "has a damaged model.safetensors"),
    ],
)
def test_a_damaged_draft_is_told_at_start(
    tmp_path: Path,
    prompts: list[list[int]],
    converted: dict[str, Path],
    damage: Callable[[Path], None],
    sentence: str,
) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(converted["hass"], draft)
    damage(draft)
    stopped = run_engine(prompts, tmp_path / "result", **speculation(draft))
    assert isinstance(stopped, Stopped)
    assert f"{draft} {sentence}" in stopped.log


def test_a_draft_for_another_verifier_is_told_at_start(
    tmp_path: Path, prompts: list[list[int]], converted: dict[str, Path], tiny_verifier: Path
) -> None:
    stopped = run_engine(
        prompts, tmp_path / "result", model=str(tiny_verifier), **speculation(converted["hass"])
    )
    assert isinstance(stopped, Stopped)
    assert "its hidden size is 576, the verifier's is 128" in stopped.log


def test_a_draft_that_was_not_converted_is_told_at_start(
    tmp_path: Path, prompts: list[list[int]], published: dict[str, Path]
) -> None:
    stopped = run_engine(prompts, tmp_path / "result", **speculation(published["hass"]))
    assert isinstance(stopped, Stopped)
    assert "has a bias on fc (fc.bias), which vLLM's own EAGLE model does not compute" in (
        stopped.log
    )
    assert f"speculators convert eagle {published['hass']} OUTPUT BASE_MODEL" in stopped.log


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, converted: dict[str, Path]
) -> Iterator[Server]:
    """`vllm serve DIR`: the verifier is the one that the draft's config names."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(converted["hass"], log) as running:
        yield running


def test_the_server_takes_the_verifier_from_the_config(
    server: Server, prompts: list[list[int]], without: Answers
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    for prompt, tokens in list(zip(prompts, without.tokens, strict=True))[:4]:
        answer = server.post(
            "/v1/completions", prompt=prompt, temperature=0, max_tokens=len(tokens)
        )
        assert answer["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer["usage"]["completion_tokens"] == len(tokens)
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_the_server_answers_chats_in_a_stream(server: Server, without: Answers) -> None:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    question = {"role": "user", "content": QUESTIONS[0]}
    pieces = list(
        server.stream(
            "/v1/chat/completions",
            messages=[question],
            temperature=0,
            max_tokens=len(without.tokens[0]),
        )
    )
    texts = [piece["choices"][0]["delta"].get("content") or "" for piece in pieces]
    expected = tokenizer.decode(without.tokens[0], skip_special_tokens=True)
    assert "".join(texts) == expected
    assert len([text for text in texts if text]) > 1


def test_the_server_answers_several_at_once(
    server: Server, prompts: list[list[int]], without: Answers
) -> None:
    answer = server.post(
        "/v1/completions", prompt=prompts, temperature=0, max_tokens=len(without.tokens[0])
    )
    assert len(answer["choices"]) == len(prompts)
