"""Measuring a draft where it is served, against a stand-in for vLLM's server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PLAIN, CommandLine, entries
from mtp_verifiers import GOLDEN_MTP
from speculators.evaluate.metrics import Acceptance, count_steps, total
from speculators.evaluate.report import Report, Served
from vllm_server import POSITIONS, VllmServer

PROMPTS = [
    {"question_id": 1, "category": "short", "prompt": "A b c"},
    {"question_id": 2, "category": "long", "prompt": "Seven words are in this one prompt."},
    {"question_id": 3, "category": "short", "prompt": "A b c d e f g"},
]


@pytest.fixture
def draft(converted: dict[str, Path]) -> Path:
    return converted[PLAIN]


@pytest.fixture
def arguments(draft: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return ["evaluate", str(draft), f"--prompts={prompts}", "--max-new-tokens=20"]


def expected(*numbers: int) -> Acceptance:
    """What the stand-in does for prompts with these numbers."""
    steps = [VllmServer.steps_of(str(PROMPTS[number - 1]["prompt"])) for number in numbers]
    return total(count_steps(taken, [POSITIONS] * len(taken)) for taken in steps)


def report_of(text: str) -> Report:
    return Report.model_validate_json(text)


def test_an_mtp_is_measured_where_it_is_served(
    arguments: list[str], speculators: CommandLine
) -> None:
    """Neither a conversion nor its verifier is needed."""
    with VllmServer() as server:
        run = speculators("evaluate", GOLDEN_MTP, *arguments[2:], "--server", server.url, "--json")
    assert run.status == 0, run.stderr
    report = report_of(run.stdout)
    assert report.draft == str(GOLDEN_MTP)
    [result] = report.results
    assert result.overall.acceptance == expected(1, 2, 3)


def test_what_the_server_counts_is_reported(
    arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    with VllmServer() as server:
        run = speculators(
            *arguments, "--server", server.url + "/v1/", "--output", tmp_path / "report"
        )
        assert run.status == 0, run.stderr
        assert server.at_once == 2
    report = report_of((tmp_path / "report" / "report.json").read_text())
    assert entries(tmp_path / "report") == [
        "acceptance_by_position.png",
        "acceptance_length_by_category.png",
        "report.json",
    ]
    [result] = report.results
    assert result.proposal.speculative_tokens == POSITIONS
    assert result.overall.acceptance == expected(1, 2, 3)
    assert {name: it.acceptance for name, it in result.categories.items()} == {
        "short": expected(1, 3),
        "long": expected(2),
    }
    assert (report.verifier, report.complete, report.chat_template) == ("org/verifier", True, True)
    assert report.environment == Served(url=server.url, vllm="0.99.0", baseline_url=None)
    assert {prompt.id: prompt.speculative[0].new_tokens for prompt in report.prompts} == {
        str(line["question_id"]): len(VllmServer.answer(str(line["prompt"]))) for line in PROMPTS
    }
    assert f"{result.overall.acceptance_length:.2f}" in run.stdout
    assert "Greedy decoding, up to 20 new tokens, by vLLM 0.99.0." in run.stdout
    assert f"Served at {server.url}, with a concurrency of 8." in run.stdout
    assert {body["temperature"] for body in server.requests} == {0}


def test_one_at_a_time_is_counted_by_prompt(arguments: list[str], speculators: CommandLine) -> None:
    with VllmServer() as server:
        run = speculators(*arguments, "--server", server.url, "--concurrency=1", "--json")
        assert run.status == 0, run.stderr
        assert server.at_once == 1
    report = report_of(run.stdout)
    counted = [prompt.speculative[0].acceptance for prompt in report.prompts]
    assert counted == [expected(number) for number in (1, 2, 3)]
    assert report.results[0].overall.acceptance == expected(1, 2, 3)


def test_outputs_are_compared_with_a_second_server(
    arguments: list[str], speculators: CommandLine
) -> None:
    with VllmServer() as server, VllmServer(drafts=False, changed="Seven") as alone:
        run = speculators(
            *arguments, "--server", server.url, "--baseline-server", alone.url, "--json"
        )
    assert run.status == 0, run.stderr
    report = report_of(run.stdout)
    overall = report.results[0].overall
    assert (overall.identical, overall.prompts) == (2, 3)
    assert overall.speedup is not None
    [difference] = [
        prompt.speculative[0].difference for prompt in report.prompts if prompt.category == "long"
    ]
    assert difference is not None
    assert (difference.position, difference.plain, difference.speculative) == (2, 7, 102)


def test_without_a_chat_template_prompts_are_plain_text(
    arguments: list[str], speculators: CommandLine
) -> None:
    with VllmServer(template=False) as server:
        run = speculators(*arguments, "--server", server.url, "--json")
    assert run.status == 0, run.stderr
    assert not report_of(run.stdout).chat_template
    assert {body["prompt"] for body in server.requests} == {line["prompt"] for line in PROMPTS}


def test_sampling_is_asked_for_with_a_seed_for_each_prompt(
    arguments: list[str], speculators: CommandLine
) -> None:
    with VllmServer() as server:
        sampled = ["--temperature=0.7", "--top-p=0.9", "--seed=5"]
        assert speculators(*arguments, "--server", server.url, *sampled).status == 0
    bodies = [body for body in server.requests if body["max_tokens"] > 1]
    assert sorted(body["seed"] for body in bodies) == [5, 6, 7]
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in bodies} == {
        (0.7, 0.9, 0)
    }


def test_a_key_is_sent(
    arguments: list[str], speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VllmServer(key="secret") as server:
        run = speculators(*arguments, "--server", server.url)
        assert run.status == 1
        assert "answers with status 401: Unauthorized" in run.errors[0]
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        assert speculators(*arguments, "--server", server.url).status == 0


def test_a_server_that_answers_others_too(
    arguments: list[str], speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = VllmServer.answer
    with VllmServer() as server:

        def busy(text: str) -> list[int]:
            server.generated += 11
            return answer(text)

        monkeypatch.setattr(server, "answer", busy)
        run = speculators(*arguments, "--server", server.url)
    assert run.status == 0
    assert any("its answers to others are counted, too" in it for it in run.messages)


def test_a_server_without_a_draft(arguments: list[str], speculators: CommandLine) -> None:
    with VllmServer(drafts=False) as server:
        run = speculators(*arguments, "--server", server.url)
    assert run.status == 1
    assert "it serves the verifier alone" in run.errors[0]


def test_a_server_that_is_not_there(arguments: list[str], speculators: CommandLine) -> None:
    with VllmServer() as server:
        pass
    run = speculators(*arguments, "--server", server.url)
    assert run.status == 1
    assert f"The server {server.url} cannot be reached" in run.errors[0]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--server=localhost:8000"], 1, "Give the server's address"),
        (["--server=http://me:secret@localhost:8000"], 1, "Give the server's address"),
        (["--server=http://a", "--num-draft-tokens=3"], 2, "--num-draft-tokens does not work with"),
        (["--server=http://a", "--dtype=bf16"], 2, "--dtype does not work with --server"),
        (["--baseline-server=http://a"], 2, "only works with --server"),
    ],
)
def test_what_cannot_be_asked_for(
    arguments: list[str], speculators: CommandLine, options: list[str], status: int, message: str
) -> None:
    run = speculators(*arguments, *options)
    assert run.status == status
    assert message in " ".join(run.stderr.replace("│", " ").split())
    assert "secret" not in run.stderr


def test_a_server_needs_no_torch_here(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom speculators.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    with VllmServer() as server:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--server", server.url],
            check=True,
            capture_output=True,
            text=True,
        )
    assert done.stderr.splitlines()[-1] == "False"
