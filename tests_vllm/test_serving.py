"""Converted drafts in the real engine."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import drafts
from drafts import VARIANTS, VERIFIER
from processes import (
    ENGINE,
    LENGTH,
    MAX_TOKENS,
    ONE_CORE_EACH,
    WITHOUT_PLUGINS,
    Answers,
    DidNotStartError,
    Server,
    engine,
    run,
    serve,
)
from simulation import simulate
from speculators.convert.eagle import EagleConverter
from speculators.convert.export import export
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.evaluate.report import Report
from speculators.models.eagle import EagleSpeculator

PROMPTS = 16

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Those that `speculators evaluate` takes, as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    chats = [
        [message.model_dump() for message in prompt.messages]
        for prompt in read_prompts(OWN_PROMPTS)[:PROMPTS]
    ]
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
    return run(tmp_path_factory.mktemp("without") / "result", prompts, ENGINE).answers


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
            result = tmp_path_factory.mktemp(variant) / "result"
            known[variant] = run(result, prompts, engine(converted[variant])).answers
        return known[variant]

    return answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_speculation_changes_nothing_that_is_said(
    without: Answers, with_draft: Callable[[str], Answers], variant: str
) -> None:
    answers = with_draft(variant)
    assert answers.tokens == without.tokens
    assert len(answers.tokens) == PROMPTS
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
    assert answers.acceptance_length == pytest.approx(ours.acceptance_length, abs=0.02)


@pytest.mark.parametrize("variant", ["eagle1"])
def test_as_much_is_accepted_as_evaluate_says(
    tmp_path: Path,
    converted: dict[str, Path],
    with_draft: Callable[[str], Answers],
    variant: str,
) -> None:
    options = {
        "limit": PROMPTS,
        "max-new-tokens": MAX_TOKENS,
        "num-draft-tokens": LENGTH,
        "dtype": "float32",
        "device": "cpu",
        "output": tmp_path / "report",
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "speculators", "evaluate", converted[variant]),
            *(f"--{name}={value}" for name, value in options.items()),
            "--acceptance-only",
        ],
        check=True,
    )
    report = Report.model_validate_json((tmp_path / "report/report.json").read_text())
    expected = report.results[0].overall.acceptance_length
    assert with_draft(variant).acceptance_length == pytest.approx(expected, abs=0.05)


def test_one_draft_in_two_ways(
    tmp_path: Path, prompts: list[list[int]], tiny_verifier: Path
) -> None:
    """A draft with every feature: as it is, eagerly, by one worker; and older, compiled, by two."""
    published = drafts.tiny_draft(tmp_path / "published")
    draft = EagleConverter().convert(published, tmp_path / "converted", tiny_verifier)
    older = drafts.in_the_older_layout(draft, tmp_path / "older")
    arguments = {"model": str(tiny_verifier)}
    compiled = engine(older, **arguments, tensor_parallel_size=2, enforce_eager=False)
    once = run(tmp_path / "once", prompts, engine(draft, **arguments)).answers
    again = run(tmp_path / "again", prompts, compiled, environment=ONE_CORE_EACH).answers
    assert again == once
    assert sum(once.accepted) > 0


@pytest.mark.parametrize("variant", ["eagle1", "attention_biases"])
def test_an_exported_draft_is_served_without_the_plugin(
    tmp_path: Path,
    prompts: list[list[int]],
    converted: dict[str, Path],
    without: Answers,
    with_draft: Callable[[str], Answers],
    variant: str,
) -> None:
    exported = export(converted[variant], tmp_path / "exported", "vllm")
    outcome = run(
        tmp_path / "result",
        prompts,
        engine(exported),
        # Otherwise the tests above would show nothing.
        {"converted": engine(converted[variant])},
        environment=WITHOUT_PLUGINS,
    )
    assert outcome.answers.tokens == without.tokens
    assert outcome.answers.accepted == with_draft(variant).accepted
    assert "Expected one of" in outcome.refused["converted"]


def without_a_tensor(draft: Path, directory: Path) -> Path:
    shutil.copytree(draft, directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    return directory


def cut_in_half(draft: Path, directory: Path) -> Path:
    shutil.copytree(draft, directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return directory


def with_a_wrong_config(draft: Path, directory: Path) -> Path:
    shutil.copytree(draft, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["transformer_layer_architecture"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_what_cannot_be_served_is_told_at_start(
    tmp_path: Path, published: dict[str, Path], converted: dict[str, Path], tiny_verifier: Path
) -> None:
    draft = converted["hass"]
    incomplete = without_a_tensor(draft, tmp_path / "incomplete")
    truncated = cut_in_half(draft, tmp_path / "truncated")
    misconfigured = with_a_wrong_config(draft, tmp_path / "misconfigured")
    refused = run(
        tmp_path / "result",
        [],
        None,
        {
            "incomplete": engine(incomplete),
            "truncated": engine(truncated),
            "misconfigured": engine(misconfigured),
            "other verifier": engine(draft, model=str(tiny_verifier)),
            "not converted": engine(published["hass"]),
            "not converted, layernorms": engine(published["layernorms"]),
        },
    ).refused
    assert refused["incomplete"] == (
        f"FormatError: {incomplete} lacks layers.0.mlp.up_proj.weight, by its config.json; "
        "convert it again."
    )
    assert refused["truncated"].startswith(
        f"CheckpointError: {truncated} has a damaged model.safetensors"
    )
    assert (
        "config.json, key transformer_layer_architecture: Field required"
        in (refused["misconfigured"])
    )
    assert refused["other verifier"] == (
        f"VerifierError: The draft {draft} does not fit the verifier {tiny_verifier}: its hidden "
        "size is 576, the verifier's is 128; serve it with the model that it was trained for."
    )
    for name, variant, feature in (
        ("not converted", "hass", "a bias on fc (fc.bias)"),
        ("not converted, layernorms", "layernorms", "extra layernorms (embed_layernorm.weight)"),
    ):
        assert refused[name] == (
            f"ConversionError: {published[variant]} has {feature}, which vLLM's own EAGLE model "
            "does not compute; convert it, and name the result instead: "
            f"speculators convert eagle {published[variant]} OUTPUT BASE_MODEL"
        )


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, converted: dict[str, Path]
) -> Iterator[Server]:
    """`vllm serve DIR`: the verifier is the one that the draft's config names."""
    log = tmp_path_factory.mktemp("server") / "log"
    number = json.dumps({"num_speculative_tokens": LENGTH})
    with serve(log, converted["hass"], f"--speculative-config={number}") as running:
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


def test_the_server_answers_all_at_once(
    server: Server, prompts: list[list[int]], with_draft: Callable[[str], Answers]
) -> None:
    names = [f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "accepted_tokens")]
    before = [server.metric(name) for name in names]
    answer = server.post("/v1/completions", prompt=prompts, temperature=0, max_tokens=MAX_TOKENS)
    assert len(answer["choices"]) == PROMPTS
    drafted, accepted = (server.metric(name) - it for name, it in zip(names, before, strict=True))
    assert 1 + accepted / drafted == pytest.approx(with_draft("hass").acceptance_length, abs=0.05)


def test_the_server_answers_chats_in_a_stream(server: Server, without: Answers) -> None:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    messages = [message.model_dump() for message in read_prompts(OWN_PROMPTS)[0].messages]
    length = len(without.tokens[0])
    pieces = list(
        server.stream("/v1/chat/completions", messages=messages, temperature=0, max_tokens=length)
    )
    texts = [piece["choices"][0]["delta"].get("content") or "" for piece in pieces]
    assert "".join(texts) == tokenizer.decode(without.tokens[0], skip_special_tokens=True)
    assert len([text for text in texts if text]) > 1


def test_a_server_that_does_not_start_says_why(tmp_path: Path, published: dict[str, Path]) -> None:
    """In the engine's process, whose log is the server's."""
    draft = {"method": "eagle", "model": str(published["hass"]), "num_speculative_tokens": LENGTH}
    option = f"--speculative-config={json.dumps(draft)}"
    with (
        pytest.raises(DidNotStartError, match=r"has a bias on fc \(fc\.bias\)"),
        serve(tmp_path / "log", VERIFIER, option),
    ):
        pass
