"""Converted drafts, served by the real vLLM."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from loguru import logger
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
    DidNotStartError,
    Outcomes,
    Server,
    engine,
    run,
    serve,
)
from simulation import Known, known, simulate
from speculators.cli import main
from speculators.convert.eagle import EagleConverter
from speculators.convert.export import export
from speculators.evaluate.prompts import OWN_PROMPTS, read_prompts
from speculators.evaluate.report import Report
from speculators.models.eagle import EagleSpeculator

torch.set_num_threads(1)


@pytest.fixture(scope="session", params=[8, pytest.param(16, marks=pytest.mark.exhaustive)])
def prompts(request: pytest.FixtureRequest) -> list[list[int]]:
    """The first prompts of `speculators evaluate`, as tokens; exhaustive: more of them."""
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    chats = [
        [message.model_dump() for message in prompt.messages]
        for prompt in read_prompts(OWN_PROMPTS)[: request.param]
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
    """The published drafts, converted."""
    root = tmp_path_factory.mktemp("converted")
    return {
        name: EagleConverter().convert(directory, root / name, VERIFIER)
        for name, directory in published.items()
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny verifier, and a converted draft for it with every feature."""
    root = tmp_path_factory.mktemp("tiny")
    verifier = drafts.tiny_verifier(root / "verifier")
    published = drafts.tiny_draft(root / "published")
    return verifier, EagleConverter().convert(published, root / "converted", verifier)


@pytest.fixture(scope="session")
def damaged(
    tmp_path_factory: pytest.TempPathFactory, converted: dict[str, Path]
) -> dict[str, Path]:
    """Converted drafts that were damaged afterwards."""
    root = tmp_path_factory.mktemp("damaged")
    found = {name: root / name for name in ("incomplete", "truncated", "misconfigured")}
    for directory in found.values():
        shutil.copytree(converted["hass"], directory)

    weights = found["incomplete"] / "model.safetensors"
    tensors = load_file(weights)
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights)

    weights = found["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])

    file = found["misconfigured"] / "config.json"
    config = json.loads(file.read_text())
    del config["transformer_layer_architecture"]
    file.write_text(json.dumps(config))
    return found


@pytest.fixture(scope="session")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[list[int]],
    published: dict[str, Path],
    converted: dict[str, Path],
    damaged: dict[str, Path],
    tiny: tuple[Path, Path],
) -> Outcomes:
    """What vLLM with the plugin does with each of them: its answers, or why it did not start."""
    tiny_verifier, tiny_draft = tiny
    engines = {
        "without": ENGINE,
        **{variant: engine(draft) for variant, draft in converted.items()},
        **{name: engine(draft) for name, draft in damaged.items()},
        **{f"published {name}": engine(published[name]) for name in ("hass", "layernorms")},
        "tiny": engine(tiny_draft, model=str(tiny_verifier)),
        "misplaced": engine(converted["hass"], model=str(tiny_verifier)),
    }
    outcomes = run(tmp_path_factory.mktemp("outcomes") / "result", prompts, engines)
    assert outcomes.answers.keys() == {"without", *VARIANTS, "tiny"}, outcomes.refused
    return outcomes


@pytest.mark.parametrize("variant", VARIANTS)
def test_speculation_changes_nothing_that_is_said(
    outcomes: Outcomes, prompts: list[list[int]], variant: str
) -> None:
    answers = outcomes.answers[variant]
    assert answers.tokens == outcomes.answers["without"].tokens
    assert len(answers.tokens) == len(prompts)
    assert answers.acceptance_length > 1.8  # the draft really drafted


@pytest.fixture(scope="module")
def verifier() -> Any:
    return LlamaForCausalLM.from_pretrained(VERIFIER, dtype=torch.float32)


@pytest.fixture(scope="module")
def conversations(verifier: Any, prompts: list[list[int]], outcomes: Outcomes) -> list[Known]:
    """The prompts and the verifier's answers, which a test above finds to be those of all."""
    return known(verifier, prompts, outcomes.answers["without"].tokens, LENGTH)


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_much_is_accepted_as_of_our_own_model(
    verifier: Any,
    conversations: list[Known],
    converted: dict[str, Path],
    outcomes: Outcomes,
    variant: str,
) -> None:
    answers = outcomes.answers[variant]
    draft = EagleSpeculator.from_pretrained(
        converted[variant], verifier=verifier, dtype=torch.float32
    )
    ours = simulate(draft, conversations, LENGTH)
    assert answers.acceptance_length == pytest.approx(ours.acceptance_length, abs=0.05)


def evaluated(draft: Path, prompts: list[list[int]], *options: str) -> Report:
    """What `speculators evaluate` reports of the prompts, in this process, which has torch."""
    size = (f"--limit={len(prompts)}", f"--max-new-tokens={MAX_TOKENS}", "--json")
    with (
        patch.object(sys, "argv", ["speculators", "evaluate", str(draft), *size, *options]),
        redirect_stdout(StringIO()) as stdout,
        redirect_stderr(StringIO()) as stderr,
        pytest.raises(SystemExit) as done,
    ):
        main()
    logger.remove()
    assert not done.value.code, stderr.getvalue()
    assert "is counted too" not in stderr.getvalue()
    return Report.model_validate_json(stdout.getvalue())


@pytest.fixture(scope="module")
def evaluated_here(converted: dict[str, Path], prompts: list[list[int]]) -> Callable[[str], Report]:
    """How well a variant drafts by decoding in this process, measured once."""
    options = ("--acceptance-only", "--dtype=float32", "--device=cpu")
    return cache(
        lambda variant: evaluated(
            converted[variant], prompts, f"--num-draft-tokens={LENGTH}", *options
        )
    )


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("eagle1", marks=pytest.mark.exhaustive),
        "hass",
        pytest.param("layernorms", marks=pytest.mark.exhaustive),
    ],
)
def test_as_much_is_accepted_as_evaluate_says(
    outcomes: Outcomes, evaluated_here: Callable[[str], Report], variant: str
) -> None:
    """One draft, since the test above has all of them; exhaustive: every trained one."""
    expected = evaluated_here(variant).results[0].overall.acceptance_length
    assert outcomes.answers[variant].acceptance_length == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_one_draft_in_two_ways(
    tmp_path: Path,
    prompts: list[list[int]],
    outcomes: Outcomes,
    tiny: tuple[Path, Path],
    workers: int,
) -> None:
    """Serve it as it is, eagerly; and in the older layout, compiled; exhaustive: by two workers."""
    verifier, draft = tiny
    older = drafts.in_the_older_layout(draft, tmp_path / "older")
    compiled = engine(older, model=str(verifier), tensor_parallel_size=workers, enforce_eager=False)
    environment = ONE_CORE_EACH if workers > 1 else None
    again = run(tmp_path / "result", prompts, {"compiled": compiled}, environment)
    assert not again.refused
    assert again.answers["compiled"] == outcomes.answers["tiny"]
    assert sum(outcomes.answers["tiny"].accepted) > 0


@pytest.mark.parametrize(
    "variants",
    [
        ("attention_biases",),
        pytest.param(("eagle1", "attention_biases"), marks=pytest.mark.exhaustive),
    ],
    ids=["some", "all"],
)
def test_an_exported_draft_is_served_without_the_plugin(
    tmp_path: Path,
    prompts: list[list[int]],
    converted: dict[str, Path],
    outcomes: Outcomes,
    variants: tuple[str, ...],
) -> None:
    """With every tensor that vLLM computes with; exhaustive: also with the verifier's embedding."""
    engines = {
        # Otherwise the tests above would prove nothing.
        "converted": engine(converted["eagle1"]),
        **{it: engine(export(converted[it], tmp_path / it, "vllm")) for it in variants},
    }
    unplugged = run(tmp_path / "result", prompts, engines, WITHOUT_PLUGINS)
    assert unplugged.refused.keys() == {"converted"}
    assert "Expected one of" in unplugged.refused["converted"]
    for variant in variants:
        assert unplugged.answers[variant] == outcomes.answers[variant]


def test_a_damaged_draft_is_told_at_start(outcomes: Outcomes, damaged: dict[str, Path]) -> None:
    assert outcomes.refused["incomplete"] == (
        f"FormatError: {damaged['incomplete']} lacks layers.0.mlp.up_proj.weight, "
        "by its config.json; convert it again."
    )
    assert outcomes.refused["truncated"].startswith(
        f"CheckpointError: {damaged['truncated']} has a damaged model.safetensors"
    )
    assert (
        "config.json, key transformer_layer_architecture: Field required"
        in (outcomes.refused["misconfigured"])
    )


def test_a_draft_for_another_verifier_is_told_at_start(
    outcomes: Outcomes, converted: dict[str, Path], tiny: tuple[Path, Path]
) -> None:
    assert outcomes.refused["misplaced"] == (
        f"VerifierError: The draft {converted['hass']} does not fit the verifier {tiny[0]}: its "
        "hidden size is 576, but the verifier's is 128; "
        "serve it with the model that it was trained for."
    )


@pytest.mark.parametrize(
    ("variant", "feature"),
    [
        ("hass", "a bias on fc (fc.bias)"),
        ("layernorms", "extra layernorms (embed_layernorm.weight)"),
    ],
)
def test_a_draft_that_was_not_converted_is_told_at_start(
    outcomes: Outcomes, published: dict[str, Path], variant: str, feature: str
) -> None:
    reason = outcomes.refused[f"published {variant}"]
    assert reason.startswith(
        f"ConversionError: {published[variant]} has {feature}, which vLLM's own EAGLE model "
        "does not compute; convert it"
    )
    assert reason.endswith(f": speculators convert eagle {published[variant]} OUTPUT BASE_MODEL")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, converted: dict[str, Path]
) -> Iterator[Server]:
    """`vllm serve DIR`, with the verifier that the draft's config names."""
    log = tmp_path_factory.mktemp("server") / "log"
    number = json.dumps({"num_speculative_tokens": LENGTH})
    with serve(log, converted["hass"], f"--speculative-config={number}") as running:
        yield running


def test_the_server_takes_the_verifier_from_the_config(
    server: Server, prompts: list[list[int]], outcomes: Outcomes
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    for prompt, tokens in list(zip(prompts, outcomes.answers["without"].tokens, strict=True))[:4]:
        answer = server.post(
            "/v1/completions", prompt=prompt, temperature=0, max_tokens=len(tokens)
        )
        assert answer["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer["usage"]["completion_tokens"] == len(tokens)


def test_the_server_answers_all_at_once(
    server: Server, prompts: list[list[int]], outcomes: Outcomes
) -> None:
    names = [f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "accepted_tokens")]
    before = [server.metric(name) for name in names]
    answer = server.post("/v1/completions", prompt=prompts, temperature=0, max_tokens=MAX_TOKENS)
    assert len(answer["choices"]) == len(prompts)
    drafted, accepted = (server.metric(name) - it for name, it in zip(names, before, strict=True))
    assert 1 + accepted / drafted == pytest.approx(
        outcomes.answers["hass"].acceptance_length, abs=0.05
    )


def test_the_server_answers_chats_in_a_stream(server: Server, outcomes: Outcomes) -> None:
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    messages = [message.model_dump() for message in read_prompts(OWN_PROMPTS)[0].messages]
    length = len(outcomes.answers["without"].tokens[0])
    pieces = list(
        server.stream("/v1/chat/completions", messages=messages, temperature=0, max_tokens=length)
    )
    texts = [piece["choices"][0]["delta"].get("content") or "" for piece in pieces]
    assert "".join(texts) == tokenizer.decode(
        outcomes.answers["without"].tokens[0], skip_special_tokens=True
    )
    assert len([text for text in texts if text]) > 1


def test_a_served_draft_is_measured(
    server: Server,
    converted: dict[str, Path],
    prompts: list[list[int]],
    evaluated_here: Callable[[str], Report],
) -> None:
    """By the server's counters, as by decoding here; at once, and one prompt at a time."""
    local = evaluated_here("hass")
    here = local.results[0].overall
    assert here.acceptance_length is not None
    alone = f"--baseline-server={server.address}"
    for options in (["--concurrency=4", alone], ["--concurrency=1"]):
        report = evaluated(converted["hass"], prompts, f"--server={server.address}", *options)
        there = report.results[0].overall
        assert there.acceptance_length == pytest.approx(here.acceptance_length, abs=0.05)
        assert there.acceptance_rates == pytest.approx(here.acceptance_rates, abs=0.05)
        assert [it.prompt_tokens for it in report.prompts] == [
            it.prompt_tokens for it in local.prompts
        ]
        assert there.new_tokens == here.new_tokens
        assert there.identical == (len(prompts) if alone in options else None)


@pytest.mark.exhaustive
def test_a_server_that_does_not_start_says_why(tmp_path: Path, published: dict[str, Path]) -> None:
    """The engine's process says it, as above, and its log is part of the server's."""
    draft = {"method": "eagle", "model": str(published["hass"]), "num_speculative_tokens": LENGTH}
    option = f"--speculative-config={json.dumps(draft)}"
    with (
        pytest.raises(DidNotStartError, match=r"has a bias on fc \(fc\.bias\)"),
        serve(tmp_path / "log", VERIFIER, option),
    ):
        pass
