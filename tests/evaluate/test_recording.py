"""The commands: recording texts, scoring drafts on them, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from block_drafts import knowing_dflash
from eagle3 import knowing_eagle3
from helpers import CommandLine, entries
from hub_server import HubServer, patch_hub
from mtp_verifiers import GOLDEN_MTP
from pair import NEW_TOKENS, PROMPTS, Pair, make_pair, tiny_tokenizer
from speculators.errors import EvaluationError
from speculators.evaluate.recording import scoring
from speculators.evaluate.recording.manifest import Manifest
from speculators.evaluate.report import Comparison, Report
from tiny_models import tiny_verifier

RECORDED = [f"{index:05}.safetensors" for index in range(len(PROMPTS))] + ["recording.json"]


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
def recording(pair: Pair, prompts: Path, tmp_path: Path, speculators: CommandLine) -> Path:
    output = tmp_path / "recording"
    run = speculators(
        "record", pair.verifier, output, f"--prompts={prompts}", f"--max-new-tokens={NEW_TOKENS}"
    )
    assert run.status == 0, run.stderr
    return output


def report_of(stdout: str) -> Report:
    return Report.model_validate_json(stdout)


def test_a_recording_scores_what_decoding_counts(
    pair: Pair, recording: Path, prompts: Path, speculators: CommandLine
) -> None:
    assert entries(recording) == RECORDED
    shared = ["--num-draft-tokens=1..3,5", "--json"]
    scored = speculators("evaluate", pair.draft, "--recording", recording, *shared)
    decoded = speculators(
        "evaluate", pair.draft, f"--prompts={prompts}", f"--max-new-tokens={NEW_TOKENS}",
        "--acceptance-only", *shared,
    )  # fmt: skip
    assert (scored.status, decoded.status) == (0, 0), scored.stderr + decoded.stderr
    found, expected = report_of(scored.stdout), report_of(decoded.stdout)
    assert [it.proposal.speculative_tokens for it in found.results] == [1, 2, 3, 5]
    assert [it.overall.acceptance for it in found.results] == [
        it.overall.acceptance for it in expected.results
    ]
    for one, other in zip(found.results, expected.results, strict=True):
        assert {name: it.acceptance for name, it in one.categories.items()} == {
            name: it.acceptance for name, it in other.categories.items()
        }
    assert sum(found.results[2].overall.acceptance.accepted) > 5
    assert found.complete
    assert (found.verifier, found.chat_template) == (expected.verifier, expected.chat_template)
    assert found.settings.recording == str(recording)
    assert found.results[0].overall.tokens_per_second is None


@pytest.mark.parametrize("proposal", ["static_tree", "dynamic_tree", "sampling"])
def test_every_proposal_method_is_scored(
    pair: Pair, recording: Path, speculators: CommandLine, proposal: str
) -> None:
    run = speculators("evaluate", pair.draft, "--recording", recording, "--proposal", proposal)
    assert run.status == 0, run.stderr
    assert f"Scored on the texts in {recording}, without the verifier." in run.stdout
    logged = [message for message in run.messages if "acceptance length" in message]
    assert [message.partition(",")[0] for message in logged] == [
        "1 of 3: prompt 81 (writing)",
        "2 of 3: prompt 82 (writing)",
        "3 of 3: prompt 101 (math)",
    ]


def test_drafts_are_compared(
    pair: Pair,
    recording: Path,
    speculators: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = shutil.copytree(pair.draft, tmp_path / "other")
    output = tmp_path / "comparison"
    drafts = ("evaluate", pair.draft, other, "--recording", recording, "--num-draft-tokens=2,4")
    run = speculators(*drafts, "--output", output)
    assert run.status == 0, run.stderr
    assert entries(output) == ["acceptance_by_position.png", "comparison.json"]
    comparison = Comparison.model_validate_json((output / "comparison.json").read_text())
    assert [report.draft for report in comparison.drafts] == [str(pair.draft), str(other)]
    one, another = comparison.drafts
    assert one.results == another.results
    assert run.stdout.splitlines()[0] == f"2 drafts for {pair.verifier}"
    again = speculators(*drafts, "--json", "--output", output, "--overwrite")
    assert again.status == 0, again.stderr
    assert Comparison.model_validate_json(again.stdout) == comparison

    load = scoring.load_scored

    def fails(draft: Any, *rest: Any) -> Any:
        if draft.name == str(other):
            raise EvaluationError("It does not load.")
        return load(draft, *rest)

    monkeypatch.setattr(scoring, "load_scored", fails)
    half = speculators(*drafts, "--json")
    assert half.status == 1
    found = Comparison.model_validate_json(half.stdout)
    assert (found.ok, found.error) == (False, "It does not load.")
    assert found.drafts == [one]  # which did not fail


def a_dflash_draft(verifier: PreTrainedModel, *, layers: tuple[int, ...]) -> Any:
    return knowing_dflash(verifier, "rnn", layers=layers, doubt=0.3)


@pytest.mark.parametrize("make", [knowing_eagle3, a_dflash_draft])
def test_layers_are_added_to_what_is_there(
    tmp_path: Path, speculators: CommandLine, prompts: Path, make: Callable[..., Any]
) -> None:
    verifier = tiny_verifier(vocab_size=320)
    verifier.save_pretrained(tmp_path / "verifier")
    tiny_tokenizer().save_pretrained(tmp_path / "verifier")
    make(verifier, layers=(0, 1, 2)).save_pretrained(tmp_path / "draft")
    recording = tmp_path / "recording"
    place = ["--verifier", tmp_path / "verifier"]
    record = ["record", tmp_path / "verifier", recording, f"--prompts={prompts}"]
    record += [f"--max-new-tokens={NEW_TOKENS}"]
    score = ["evaluate", tmp_path / "draft", "--recording", recording, "--json", *place]

    assert speculators(*record, "--layers=1").status == 0
    run = speculators(*score)
    assert run.status == 1
    assert (
        "does not have (those entering its layers 0, 2); add them: speculators record"
        in run.errors[0]
    )
    assert "--layers 0,1,2, with the same other options" in run.errors[0]
    before = (recording / "00000.safetensors").read_bytes()
    run = speculators(*record, "--layers=0,1,2")
    assert run.status == 0, run.stderr
    assert (recording / "00000.safetensors").read_bytes() == before
    run = speculators(*record, "--layers=0,2")
    assert run.status == 0
    assert "already" in run.messages[-1]

    scored = speculators(*score)
    assert scored.status == 0, scored.stderr
    decoded = speculators(
        "evaluate", tmp_path / "draft", *place, f"--prompts={prompts}", "--json",
        f"--max-new-tokens={NEW_TOKENS}", "--acceptance-only",
    )  # fmt: skip
    assert decoded.status == 0, decoded.stderr
    found, expected = report_of(scored.stdout), report_of(decoded.stdout)
    assert found.results[0].overall.acceptance == expected.results[0].overall.acceptance
    assert sum(found.results[0].overall.acceptance.accepted) > 2


def test_texts_may_be_sampled(
    pair: Pair, prompts: Path, tmp_path: Path, speculators: CommandLine
) -> None:
    recording = tmp_path / "sampled"
    record = ["record", pair.verifier, recording, f"--prompts={prompts}", "--max-new-tokens=8"]
    sampled = ["--temperature=0.8", "--top-p=0.9", "--seed=4"]
    assert speculators(*record, *sampled).status == 0
    run = speculators(
        "evaluate", pair.draft, "--recording", recording, "--proposal=sampling", "--json"
    )
    assert run.status == 0, run.stderr
    report = report_of(run.stdout)
    assert (report.settings.temperature, report.settings.top_p) == (0.8, 0.9)
    assert report.results[0].overall.acceptance_length is not None
    run = speculators(*record, "--temperature=0.8", "--top-p=0.8", "--seed=4")
    assert "was recorded with 0.9 as its --top-p, not 0.8" in run.errors[0]


def test_a_verifier_on_the_hub(
    pair: Pair,
    prompts: Path,
    tmp_path: Path,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is recognised by its commit, and a copy of it by its config."""
    recording = tmp_path / "recording"
    record = ["org/verifier", recording, f"--prompts={prompts}", "--max-new-tokens=4"]
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        commit = server.add_repo("org/verifier", pair.verifier)
        run = speculators("record", *record)
        assert run.status == 0, run.stderr
        manifest = Manifest.model_validate_json((recording / "recording.json").read_text())
        assert (manifest.verifier.name, manifest.verifier.commit) == ("org/verifier", commit)
        for options in ([], ["--device=auto"], ["--verifier", pair.verifier]):
            run = speculators("evaluate", pair.draft, "--recording", recording, *options)
            assert run.status == 0, run.stderr


# What is refused


def test_a_draft_that_drafts_in_a_way_of_its_own(
    pair: Pair, recording: Path, speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators.evaluate.recording.scoring.drafter_of", lambda *_: object())
    run = speculators("evaluate", pair.draft, "--recording", recording)
    assert run.status == 1
    assert f"{pair.draft}: a draft of the kind EagleSpeculator cannot be scored" in run.errors[0]


def test_an_mtp(recording: Path, speculators: CommandLine) -> None:
    run = speculators("evaluate", GOLDEN_MTP, "--recording", recording)
    assert len(run.errors) == 1
    assert f"{GOLDEN_MTP} has an MTP, not a converted draft: `chat`" in run.errors[0]


def test_a_layer_that_the_verifier_lacks(
    pair: Pair, speculators: CommandLine, tmp_path: Path
) -> None:
    run = speculators("record", pair.verifier, tmp_path / "recording", "--layers=1,99")
    assert run.status == 1
    assert "layers, so --layers takes 0 to" in run.errors[0]
    assert run.errors[0].endswith("and not 99.")


def another_verifier(directory: Path) -> None:
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000:] = bytes(1000)
    weights.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens=5"], "was recorded with 12 as its --max-new-tokens, not 5"),
        (["--temperature=1"], "was recorded with 0.0 as its --temperature, not 1.0"),
        (["--limit=2"], "was recorded with 3 as its --limit, not 2"),
        (["--prompts=others.jsonl"], "was recorded with other prompts"),
        (["--dtype=bf16"], "was recorded with float32 as its --dtype, not bfloat16"),
        (["--num-draft-tokens=17"], "of up to 16 tokens in a row, not 17; record again with --lon"),
        (["--recording=none"], "recording.json cannot be read"),
    ],
    ids=lambda it: it[0] if isinstance(it, list) else "",
)
def test_a_recording_that_is_not_what_was_asked_for(
    pair: Pair,
    recording: Path,
    speculators: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    others = [{"prompt": "Another one."}] * len(PROMPTS)
    (tmp_path / "others.jsonl").write_text("\n".join(map(json.dumps, others)))
    run = speculators("evaluate", pair.draft, "--recording", recording, *options)
    assert run.status == 1
    assert message in run.errors[0]


def test_a_recording_of_another_verifier(
    pair: Pair, recording: Path, speculators: CommandLine, tmp_path: Path
) -> None:
    other = shutil.copytree(pair.verifier, tmp_path / "verifier")
    same = ["evaluate", pair.draft, "--recording", recording, "--verifier", other]
    assert speculators(*same).status == 0
    another_verifier(other)
    expected = f"is a recording of {pair.verifier}, but the verifier of {{}} is {other}"
    run = speculators(*same)
    assert run.status == 1
    assert expected.format(pair.draft) in run.errors[0]
    # Or the draft's config names another one.
    draft = shutil.copytree(pair.draft, tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(other)
    (draft / "config.json").write_text(json.dumps(config))
    run = speculators("evaluate", draft, "--recording", recording)
    assert run.status == 1
    assert expected.format(draft) in run.errors[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def shorter(path: Path) -> None:
    file = path.with_name("recording.json")
    manifest = Manifest.model_validate_json(file.read_text())
    manifest.prompts[1].new_tokens -= 1
    file.write_text(manifest.model_dump_json())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "lacks 00001.safetensors; record again"),
        (cut, "00001.safetensors cannot be read"),
        (shorter, "00001.safetensors does not hold what the manifest says"),
    ],
)
def test_a_damaged_recording(
    pair: Pair,
    recording: Path,
    speculators: CommandLine,
    spoil: Callable[[Path], Any],
    message: str,
) -> None:
    spoil(recording / "00001.safetensors")
    run = speculators("evaluate", pair.draft, "--recording", recording)
    assert run.status == 1
    assert message in run.errors[0]


def test_what_is_in_the_way_stays(
    pair: Pair, recording: Path, prompts: Path, speculators: CommandLine, tmp_path: Path
) -> None:
    run = speculators("record", pair.verifier, pair.draft, "--overwrite")
    assert run.status == 1
    assert "is not a recording of speculators" in run.errors[0]
    record = ("record", pair.verifier, recording, f"--prompts={prompts}", "--max-new-tokens=3")
    assert "not 3; give the same" in speculators(*record).errors[0]
    assert speculators(*record, "--overwrite").status == 0
    manifest = Manifest.model_validate_json((recording / "recording.json").read_text())
    assert manifest.settings.max_new_tokens == 3
    assert entries(recording) == RECORDED
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["evaluate", "a", "b"], "give --recording"),
        (["evaluate", "a", "b", "--recording=c", "--revision=d"], "and no --revision"),
        (["record", "a", "b", "--layers=1,x"], "is not a list of layers"),
        (["record", "a", "b", "--top-p=0"], "--top-p must be over 0"),
    ],
)
def test_what_makes_no_sense(speculators: CommandLine, options: list[str], message: str) -> None:
    run = speculators(*options)
    assert run.status == 2
    assert message in " ".join(run.stderr.replace("│", " ").split())
