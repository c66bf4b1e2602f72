"""The command: what it measures, what it writes, how it stops, and its errors."""

import io
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.generation import configuration_utils
from transformers.utils import logging as transformers_logging

from eagle3 import knowing_eagle3
from helpers import VOCABULARY, CommandLine, entries, save_quietly, tiny_llama
from hub_server import HubServer, patch_hub
from pair import NEW_TOKENS, PROMPTS, Pair, make_pair, tiny_tokenizer
from speculators.cli import report_view
from speculators.decode.gpu import cuda_graphs
from speculators.errors import EvaluationError
from speculators.evaluate.evaluation import Evaluation
from speculators.evaluate.metrics import count_steps, total
from speculators.evaluate.prompts import read_prompts
from speculators.evaluate.report import Environment, PromptResult, Report, Settings
from speculators.evaluate.subject.loading import load_subject
from speculators.evaluate.subject.opening import open_draft
from speculators.format.config import PROPOSALS, ProposalMethod
from speculators.models.eagle import EagleSpeculator

SPECULATE = "speculators.models.eagle.EagleSpeculator.generate"
speculative_generate = EagleSpeculator.generate
REPORT_FILES = [
    "acceptance_by_position.png",
    "acceptance_length_by_category.png",
    "report.json",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair that tests must not change."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return path


@pytest.fixture
def arguments(pair: Pair, prompts: Path, tmp_path: Path) -> list[str]:
    """The arguments of a small evaluation that writes ``report``."""
    options = {"prompts": prompts, "max-new-tokens": NEW_TOKENS, "output": tmp_path / "report"}
    return ["evaluate", str(pair.draft), *(f"--{key}={value}" for key, value in options.items())]


def test_a_draft_that_drafts_in_one_pass(
    pair: Pair, prompts: Path, tmp_path: Path, speculators: CommandLine
) -> None:
    verifier = AutoModelForCausalLM.from_pretrained(pair.verifier)
    speculation = {
        "algorithm": "peagle",
        "verifier": {"name_or_path": str(pair.verifier), "architectures": ["LlamaForCausalLM"]},
    }
    draft = knowing_eagle3(
        verifier, layers=(0, 1), doubt=0.002, parallel=True, speculators_config=speculation
    )
    draft.save_pretrained(tmp_path / "draft")
    given = (tmp_path / "draft", f"--prompts={prompts}", f"--max-new-tokens={NEW_TOKENS}")
    run = speculators("evaluate", *given, "--num-draft-tokens=2..3", f"--output={tmp_path / 'r'}")
    assert run.status == 0, run.stderr
    report = report_in(tmp_path / "r")
    for index, length in enumerate((2, 3)):
        expected = []
        for prompt in report.prompts:
            found = prompt.speculative[index]
            assert found.difference is None
            assert found.acceptance is not None
            assert found.acceptance.offered[0] == found.acceptance.steps
            expected.append(found.acceptance)
        found_length = report.results[index].overall.acceptance_length
        assert found_length is not None
        assert found_length > 1.2
        assert len(total(expected).accepted) == length
    run = speculators("evaluate", *given, "--proposal=dynamic_tree")
    assert run.status == 1
    assert "choose greedy or sampling" in run.errors[0]


def report_in(directory: Path) -> Report:
    return Report.model_validate_json((directory / "report.json").read_text())


def steps_by_definition(pair: Pair, text: str, length: int) -> tuple[list[int], list[int]]:
    """Accepted and offered tokens of a greedy chain, without caches, from the whole prefix."""
    verifier = AutoModelForCausalLM.from_pretrained(pair.verifier)
    draft = EagleSpeculator.from_pretrained(pair.draft, verifier=verifier)
    tokenizer = AutoTokenizer.from_pretrained(pair.verifier)
    prompt = tokenizer(f"<user>{text}<assistant>")["input_ids"]
    tokens = torch.tensor([prompt])

    def next_token(logits: torch.Tensor | None) -> torch.Tensor:
        assert logits is not None
        return logits[:, -1:].argmax(-1)

    with torch.inference_mode():
        end = len(prompt) + NEW_TOKENS
        while tokens.shape[1] < end + length:
            tokens = torch.cat((tokens, next_token(verifier(tokens).logits)), 1)
        accepted, offered = [], []
        known = len(prompt) + 1
        while known < end:  # the last step may go beyond the end
            ids = tokens[:, :known]
            hidden = verifier(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
            for _ in range(length):
                output = draft(ids[:, 1:], hidden)
                ids = torch.cat((ids, next_token(output.logits)), 1)
                hidden = torch.cat((hidden, output.last_hidden_state[:, -1:]), 1)
            offered.append(length)
            same = (ids == tokens[:, : ids.shape[1]])[0, known:].tolist()
            accepted.append([*same, False].index(False))
            known += accepted[-1] + 1
    return accepted, offered


def test_a_draft_is_measured(
    pair: Pair, arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    run = speculators(*arguments, "--num-draft-tokens=3")
    assert run.status == 0, run.stderr
    assert entries(tmp_path / "report") == REPORT_FILES
    report = report_in(tmp_path / "report")
    assert report.complete
    assert report.chat_template
    assert report.verifier == str(pair.verifier)
    assert report.recommendation is None
    assert isinstance(report.environment, Environment)
    assert report.environment.dtype == report.environment.draft_dtype == "float32"

    assert [(p.id, p.category) for p in report.prompts] == [
        ("81", "writing"),
        ("82", "writing"),
        ("101", "math"),
    ]
    expected = [
        count_steps(*steps_by_definition(pair, line["turns"][0], 3))  # type: ignore[index]
        for line in PROMPTS
    ]
    assert [prompt.speculative[0].acceptance for prompt in report.prompts] == expected
    assert all(0 < n < 33 for n in total(expected).accepted), "too simple a case to tell much"
    for prompt in report.prompts:
        assert prompt.plain is not None
        assert prompt.plain.new_tokens == prompt.speculative[0].new_tokens == NEW_TOKENS

    [result] = report.results
    assert result.proposal.speculative_tokens == 3
    assert result.overall.acceptance == total(expected)
    assert result.overall.identical == result.overall.prompts == 3
    assert {name: it.acceptance for name, it in result.categories.items()} == {
        "writing": total(expected[:2]),
        "math": expected[2],
    }
    assert f"{result.overall.acceptance_length:.2f}" in run.stdout
    assert "3 of 3" in run.stdout


def test_speeds_are_sums_of_what_was_measured(
    arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    assert speculators(*arguments).status == 0
    report = report_in(tmp_path / "report")
    overall = report.results[0].overall
    plain = sum(p.plain.seconds or 0.0 for p in report.prompts if p.plain is not None)
    with_draft = sum(prompt.speculative[0].seconds or 0.0 for prompt in report.prompts)
    assert overall.tokens_per_second == pytest.approx(3 * NEW_TOKENS / with_draft)
    assert overall.plain_tokens_per_second == pytest.approx(3 * NEW_TOKENS / plain)
    assert overall.speedup == pytest.approx(plain / with_draft)


def test_plain_and_speculative_decoding_take_turns_after_a_warm_up(
    arguments: list[str], speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    generate = LlamaForCausalLM.generate

    def speculating(*args: Any, proposal: ProposalMethod, **kwargs: Any) -> Any:
        calls.append(str(proposal.speculative_tokens))
        return speculative_generate(*args, proposal=proposal, **kwargs)

    def generating(*args: Any, **kwargs: Any) -> Any:
        if "custom_generate" not in kwargs:  # speculation passes it, to prepare its inputs
            calls.append("plain")
        return generate(*args, **kwargs)

    monkeypatch.setattr(SPECULATE, speculating)
    monkeypatch.setattr(LlamaForCausalLM, "generate", generating)
    # On a GPU, warming up takes more than one run, until all is recorded.
    assert speculators(*arguments, "--num-draft-tokens=1..2", "--device=cpu").status == 0
    warm_up, *rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert warm_up == ["plain", "1", "2"]
    assert rounds == [["plain", "1", "2"], ["1", "2", "plain"], ["2", "plain", "1"]]


def test_no_library_warns_of_how_the_verifier_samples(
    pair: Pair, speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generation_config.json is for sampling, as most are; greedy decoding does not use it."""
    verifier = shutil.copytree(pair.verifier, tmp_path / "verifier")
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    (verifier / "generation_config.json").write_text(json.dumps(said))
    warnings: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", warnings.append)
    run = speculators(
        "evaluate", pair.draft, "--verifier", verifier, "--limit=1", "--max-new-tokens=3"
    )
    assert run.status == 0, run.stderr
    assert "1 of 1" in run.stdout
    assert warnings == []


def test_a_sweep_recommends_a_draft_length(
    arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    run = speculators(*arguments, "--num-draft-tokens", "1..3")
    assert run.status == 0, run.stderr
    report = report_in(tmp_path / "report")
    speedups = {r.proposal.speculative_tokens: r.overall.speedup for r in report.results}
    assert list(speedups) == [1, 2, 3]
    assert report.recommendation is not None
    best = max(speedup for speedup in speedups.values() if speedup)
    close = [length for length, speedup in speedups.items() if speedup and speedup >= 0.99 * best]
    assert report.recommendation.speculative_tokens == close[0]
    assert report.recommendation.speedup == speedups[close[0]]
    assert f"Recommended draft length: {close[0]}, speed-up" in run.stdout
    assert entries(tmp_path / "report") == [*REPORT_FILES, "speedup_by_draft_length.png"]


def test_plots_are_pictures(arguments: list[str], speculators: CommandLine, tmp_path: Path) -> None:
    assert speculators(*arguments, "--num-draft-tokens=1..2").status == 0
    plots = list((tmp_path / "report").glob("*.png"))
    assert len(plots) == 3
    for plot in plots:
        data = plot.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        assert width > 500
        assert height > 300
        assert len(data) > 5000


def test_acceptance_alone(arguments: list[str], speculators: CommandLine, tmp_path: Path) -> None:
    run = speculators(*arguments, "--acceptance-only", "--num-draft-tokens=1..2")
    assert run.status == 0, run.stderr
    report = report_in(tmp_path / "report")
    assert report.recommendation is None
    assert all(prompt.plain is None for prompt in report.prompts)
    for result in report.results:
        assert result.overall.acceptance_length is not None
        assert result.overall.speedup is result.overall.identical is None
    assert entries(tmp_path / "report") == REPORT_FILES


def test_our_own_prompts_are_measured_without_a_report(
    pair: Pair, speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = speculators("evaluate", pair.draft, "--limit=2", "--max-new-tokens=3")
    assert run.status == 0, run.stderr
    assert "writing" in run.stdout
    assert "roleplay" in run.stdout
    assert "2 of 2" in run.stdout
    assert entries(tmp_path) == []


def test_piped_output_has_no_colours_and_whole_lines(
    pair: Pair, speculators: CommandLine, prompts: Path
) -> None:
    run = speculators("evaluate", pair.draft, "--prompts", prompts, "--max-new-tokens=3")
    assert "\x1b" not in run.stdout
    assert f"{pair.draft}, drafting for {pair.verifier}" in run.stdout.splitlines()
    assert re.search(r"^greedy +5 +\d\.\d\d +", run.stdout, re.MULTILINE), "no borders"
    assert "Measuring" not in run.stderr


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_is_shown_on_a_terminal_unless_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(report_view, "is_quiet", lambda: quiet)
    with report_view.progress_bar(3):
        pass
    assert ("Measuring" in capsys.readouterr().err) != quiet


def test_names_that_the_output_cannot_encode_are_shown_all_the_same(
    pair: Pair,
    prompts: Path,
    speculators: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = shutil.copytree(pair.draft, tmp_path / "pr\xe9")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    run = speculators(
        *("evaluate", draft, "--prompts", prompts, "--limit=1", "--max-new-tokens=3"),
        *("--output", tmp_path / "report"),
    )
    sys.stdout.flush()
    assert (run.status, run.errors) == (0, [])
    assert b"pr\\xe9, drafting for" in shown.getvalue()
    assert entries(tmp_path / "report") == REPORT_FILES


def test_a_verifier_without_a_chat_template_gets_plain_text(
    pair: Pair, arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    verifier = tmp_path / "verifier"
    shutil.copytree(pair.verifier, verifier)
    (verifier / "chat_template.jinja").unlink()
    run = speculators(*arguments, "--verifier", verifier)
    assert run.status == 0, run.stderr
    report = report_in(tmp_path / "report")
    assert not report.chat_template
    tokenizer = tiny_tokenizer(None)
    assert [prompt.prompt_tokens for prompt in report.prompts] == [
        len(tokenizer(line["turns"][0])["input_ids"])  # type: ignore[index]
        for line in PROMPTS
    ]
    assert "no chat template" in run.stdout


def test_sampled_outputs_are_not_compared(
    arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    run = speculators(*arguments, "--temperature=1.0", "--seed=3")
    assert run.status == 0, run.stderr
    report = report_in(tmp_path / "report")
    assert report.results[0].overall.identical is None
    assert report.results[0].overall.speedup is not None


@pytest.mark.parametrize("proposal", sorted(PROPOSALS))
def test_every_proposal_method_is_measured(
    arguments: list[str], speculators: CommandLine, tmp_path: Path, proposal: str
) -> None:
    run = speculators(*arguments, f"--proposal={proposal}")
    assert run.status == 0, run.stderr
    [result] = report_in(tmp_path / "report").results
    assert result.proposal == ProposalMethod(proposal_type=proposal)
    assert result.overall.identical == 3
    rates = result.overall.acceptance_rates
    assert rates == sorted(rates, reverse=True)
    assert result.overall.acceptance_length == pytest.approx(1 + sum(rates))


def test_outputs_that_differ_are_told(
    arguments: list[str], speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def wrong(*args: Any, **kwargs: Any) -> Any:
        generation: Any = speculative_generate(*args, **kwargs)
        generation.sequences[0, -2] = 7
        return generation

    monkeypatch.setattr(SPECULATE, wrong)
    run = speculators(*arguments)
    assert run.status == 0, run.stderr
    report = report_in(tmp_path / "report")
    assert report.results[0].overall.identical == 0
    for prompt in report.prompts:
        difference = prompt.speculative[0].difference
        assert difference is not None
        assert difference.position == NEW_TOKENS - 2
        assert difference.speculative == 7
    assert "0 of 3" in run.stdout
    assert "Prompt 101, draft of 5: new token 11 is 7, by plain decoding " in run.stdout


def test_loading_leaves_the_progress_bars_of_transformers_as_they_were(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    load_subject(open_draft(pair.draft))
    assert transformers_logging.is_progress_bar_enabled()
    assert "Loading weights" not in capsys.readouterr().err


# Stopping


def test_an_interrupted_evaluation_keeps_what_was_measured(
    arguments: list[str], speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Evaluation.run

    def interrupted(self: Evaluation) -> Iterator[PromptResult]:
        for result in run(self):
            yield result
            if len(self.measured) == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Evaluation, "run", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = speculators(*arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.status == 128 + signal.SIGINT, done.stderr
    assert done.errors == ["Interrupted."]
    report = report_in(tmp_path / "report")
    assert not report.complete
    assert (report.ok, report.error) == (False, "Interrupted.")
    assert [prompt.id for prompt in report.prompts] == ["81", "82"]
    assert list(report.results[0].categories) == ["writing"]
    assert "Stopped after 2 of 3 prompts." in done.stdout
    assert entries(tmp_path / "report") == REPORT_FILES


def test_a_report_that_nobody_reads_is_kept(
    arguments: list[str], speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(report_view, "print_report", broken)
    with pytest.raises(BrokenPipeError):
        speculators(*arguments)
    assert report_in(tmp_path / "report").complete


def test_an_evaluation_that_fails_keeps_what_was_measured(
    arguments: list[str], speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise EvaluationError("It broke.")
        return speculative_generate(*args, **kwargs)

    monkeypatch.setattr(SPECULATE, failing)
    run = speculators(*arguments, "--json", "--device=cpu")  # where warming up is one call
    assert run.status == 1
    assert run.errors == ["It broke."]
    report = report_in(tmp_path / "report")
    assert Report.model_validate_json(run.stdout) == report
    assert (report.ok, report.error) == (False, "It broke.")
    assert not report.complete
    assert [prompt.id for prompt in report.prompts] == ["81"]


def test_nothing_is_written_if_nothing_was_measured(
    arguments: list[str], speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise EvaluationError("It broke.")

    monkeypatch.setattr(SPECULATE, failing)
    run = speculators(*arguments)
    assert (run.status, run.stdout) == (1, "")
    assert entries(tmp_path) == ["prompts.jsonl"]


# The output


def test_an_earlier_report_is_replaced_only_if_asked(
    arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    assert speculators(*arguments, "--num-draft-tokens=1..2").status == 0
    before = (tmp_path / "report" / "report.json").read_bytes()
    run = speculators(*arguments)
    assert run.status == 1
    assert "--overwrite" in run.errors[0]
    assert (tmp_path / "report" / "report.json").read_bytes() == before
    assert speculators(*arguments, "--overwrite").status == 0
    assert entries(tmp_path / "report") == REPORT_FILES


def test_nothing_but_a_report_is_replaced(
    pair: Pair, arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    shutil.copytree(pair.draft, tmp_path / "report")
    run = speculators(*arguments, "--overwrite")
    assert run.status == 1
    assert "is not a report of speculators" in run.errors[0]
    assert entries(tmp_path / "report") == entries(pair.draft)


def test_without_matplotlib_there_is_a_report_without_plots(
    arguments: list[str], speculators: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = speculators(*arguments)
    assert run.status == 0, run.stderr
    assert entries(tmp_path / "report") == ["report.json"]
    assert any("pip install matplotlib" in message for message in run.messages)


# Errors


def without(*names: str) -> Callable[[Path], None]:
    def spoil(verifier: Path) -> None:
        for name in names:
            (verifier / name).unlink()

    return spoil


def another_size(verifier: Path) -> None:
    shutil.rmtree(verifier)
    save_quietly(tiny_llama(hidden_size=32), verifier)


def another_tokenizer(verifier: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCABULARY)])
    tokenizer.chat_template = "<300>"
    tokenizer.save_pretrained(verifier)


def a_refusing_template(verifier: Path) -> None:
    template = "{{ raise_exception('Only questions are answered.') }}"
    (verifier / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"verifier does not exist; give a directory"),
        (without("config.json"), r"has no config\.json"),
        (another_size, r"its hidden size is 64, but the verifier's is 32"),
        (without("tokenizer.json", "tokenizer_config.json"), r"^The tokenizer of the verifier .*"),
        (without("model.safetensors"), r"^The weights of the verifier .* cannot be loaded: "),
        (another_tokenizer, r"^Prompt 81 has token \d+, but the verifier knows 320"),
        (a_refusing_template, r"refuses prompt 81: Only questions are answered\."),
    ],
    ids=lambda it: getattr(it, "__name__", ""),
)
def test_a_verifier_that_cannot_be_used(
    pair: Pair,
    arguments: list[str],
    speculators: CommandLine,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    verifier = tmp_path / "verifier"
    shutil.copytree(pair.verifier, verifier)
    spoil(verifier)
    run = speculators(*arguments, "--verifier", verifier)
    assert run.status == 1, run.stdout
    assert len(run.errors) == 1
    assert re.search(message, run.errors[0])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, r"draft names no verifier in its config\.json; give it with --verifier\.$"),
        ("/no/such/verifier", r"does not exist.* config\.json names it; give another with --ver"),
    ],
)
def test_a_draft_whose_verifier_is_not_here(
    pair: Pair,
    prompts: Path,
    speculators: CommandLine,
    tmp_path: Path,
    name: str | None,
    message: str,
) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(pair.draft, draft)
    config = json.loads((draft / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = name
    (draft / "config.json").write_text(json.dumps(config))
    run = speculators("evaluate", draft, "--prompts", prompts)
    assert run.status == 1
    assert re.search(message, run.errors[0])


def test_a_draft_at_a_revision_of_the_hub(
    pair: Pair,
    arguments: list[str],
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        server.add_repo("org/draft", empty)
        commit = server.add_repo("org/draft", pair.draft, revision="v1")
        arguments[1] = "org/draft"
        assert speculators(*arguments).status == 1
        run = speculators(*arguments, "--revision", "v1")
    assert run.status == 0, run.stderr
    assert report_in(tmp_path / "report").draft_commit == commit


def test_graphs_are_recorded_before_anything_is_measured(
    pair: Pair, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def refuse(run: Callable[[], Any], device: torch.device) -> Any:
        del run, device
        events.append("record")
        raise RuntimeError("It is enough to know when it was tried.")

    def measure(*arguments: Any, **options: Any) -> PromptResult:
        events.append("measure")
        return really_measure(*arguments, **options)

    really_measure = Evaluation._measure
    monkeypatch.setattr(Evaluation, "_measure", measure)

    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", refuse)
    monkeypatch.setattr(cuda_graphs, "MIN_SLOTS", 16)
    settings = Settings(prompts_total=3, max_new_tokens=40)
    evaluation = Evaluation(
        load_subject(open_draft(pair.draft), device="cpu"),
        read_prompts(prompts),
        [ProposalMethod(speculative_tokens=2)],
        settings,
    )
    list(evaluation.run())
    assert events == [*["record"] * (len(events) - 3), *["measure"] * 3]
    assert len(events) > 4


def test_a_verifier_that_is_spread(
    arguments: list[str], speculators: CommandLine, tmp_path: Path
) -> None:
    figures = []
    for device in ("cpu", "auto"):
        report = tmp_path / device
        run = speculators(*arguments, "--device", device, "--output", report)
        assert run.status == 0, run.stderr
        said = json.loads((report / "report.json").read_text())
        figures.append(
            [said["results"][0]["overall"][key] for key in ("acceptance_length", "identical")]
        )
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--prompts=none.jsonl"], 1, "none.jsonl cannot be read: No such file"),
        (["--device=abacus"], 1, "The device 'abacus' cannot be used: "),
        (["--device=cuda:77"], 1, "The device 'cuda:77' cannot be used: "),
        (["--proposal=static_tree", "--num-draft-tokens=3"], 1, "The static tree has 25 tokens"),
        (["--num-draft-tokens=0"], 2, "neither a number of tokens"),
        (["--num-draft-tokens=4..2"], 2, "neither a number of tokens"),
        (["--num-draft-tokens=few"], 2, "neither a number of tokens"),
        (["--max-new-tokens=0"], 2, "--max-new-tokens"),
        (["--temperature=-1"], 2, "--temperature"),
        (["--proposal=guess"], 2, "--proposal"),
        (["--dtype=int8"], 2, "--dtype"),
    ],
    ids=lambda it: it[0] if isinstance(it, list) else "",
)
def test_what_cannot_be_asked_for(
    arguments: list[str], speculators: CommandLine, options: list[str], status: int, message: str
) -> None:
    run = speculators(*arguments, *options)
    assert run.status == status
    assert message in " ".join(run.errors or [run.stderr])


def test_overwrite_without_an_output_is_a_mistake(pair: Pair, speculators: CommandLine) -> None:
    run = speculators("evaluate", pair.draft, "--overwrite")
    assert run.status == 2
    assert "--overwrite only works with --output" in run.stderr
