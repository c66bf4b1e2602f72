"""Publishing by the command line and by the model, and reading back what was published."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from helpers import (
    GOLDEN,
    PLAIN,
    WRITTEN,
    CommandLine,
    Run,
    fork_processes,
    golden_vectors,
    largest_difference,
    stored_tensors,
    write_checkpoint,
)
from hub_server import MEMBER, STRANGER, HubServer, files_of, hub_environment, patch_hub
from speculators.checkpoint.output.stamp import is_stamped
from speculators.convert.eagle import EagleConverter
from speculators.errors import EvaluationError, HubError
from speculators.evaluate.metrics import count_steps
from speculators.evaluate.report import (
    Environment,
    Measurement,
    PromptResult,
    Report,
    Settings,
    SpeculativeMeasurement,
    results_by_proposal,
)
from speculators.format.config import ProposalMethod
from speculators.models.eagle import EagleSpeculator
from speculators.publish.figures import evaluation_section, read_report

ROOT = Path(__file__).parents[2]
REAL_VERIFIER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
"""``make test`` creates this before the tests run."""

PUBLISHED = sorted([".gitattributes", *WRITTEN])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verifier: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN=MEMBER)
        server.add_repo("org/verifier", verifier)
        yield server


def write_report(directory: Path, draft: str, *, complete: bool = True) -> Path:
    """Write the report of two prompts: 20 tokens each, in 5 steps that accept 3 of 3."""
    prompts = [
        PromptResult(
            id=str(number),
            category="writing",
            prompt_tokens=3,
            plain=Measurement(new_tokens=20, seconds=2.0),
            speculative=[
                SpeculativeMeasurement(
                    new_tokens=20, seconds=1.0, acceptance=count_steps([3] * 5, [3] * 5)
                )
            ],
        )
        for number in range(2)
    ]
    report = Report(
        speculators_version="1.0.0",
        complete=complete,
        draft=draft,
        verifier="org/verifier",
        chat_template=False,
        settings=Settings(prompts_total=2 if complete else 80, max_new_tokens=20),
        environment=Environment(
            device="cpu",
            threads=1,
            dtype="float32",
            draft_dtype="float32",
            torch="2.13.0",
            transformers="5.19.0",
        ),
        recommendation=None,
        results=results_by_proposal(prompts, [ProposalMethod(speculative_tokens=3)], compared=True),
        prompts=prompts,
    )
    directory.mkdir()
    (directory / "report.json").write_text(report.model_dump_json())
    return directory


FIGURES = "| greedy | 3 | 4.00 | 20.0 | 10.0 | 2.00 | 2/2 |"


def metadata_of(card: str) -> dict[str, Any]:
    """The metadata of a card, as the Hub's client reads it."""
    data: Any = ModelCard(card).data
    metadata: dict[str, Any] = data.to_dict()
    return metadata


def published(server: HubServer, repo_id: str = "org/draft") -> str:
    """The model card of a repository."""
    return (server.content(repo_id) / "README.md").read_text()


# By the command line


def test_convert_publishes(tmp_path: Path, server: HubServer, speculators: CommandLine) -> None:
    run = speculators(
        "convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", "org/verifier",
        "--push-to-hub", "org/draft", "--private",
    )  # fmt: skip
    assert run.status == 0
    assert run.messages[-2] == f"Saved to: {tmp_path / 'out'}"
    assert run.messages[-1].startswith(f"Published at: {server.url}/org/draft/commit/")
    assert not [line for line in run.stderr.splitlines() if " | " not in line]  # no bars in a log
    assert files_of(server.content("org/draft")) == PUBLISHED
    assert files_of(tmp_path / "out") == PUBLISHED[1:]
    assert server.repos["org/draft"].private
    assert metadata_of(published(server))["base_model"] == "org/verifier"
    assert is_stamped(published(server))


def test_what_is_published_can_be_loaded_and_computes_the_same(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    speculators(
        "convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", "org/verifier",
        "--push-to-hub", "org/draft",
    )  # fmt: skip
    draft = EagleSpeculator.from_pretrained("org/draft", cache_dir=tmp_path / "other")
    golden = golden_vectors(PLAIN)
    with torch.inference_mode():
        output = draft(input_ids=golden["input_ids"], hidden_states=golden["hidden_states"])
    assert output.logits is not None
    assert largest_difference(output.logits, golden["logits"]) < 1e-4


def test_a_draft_is_published_later_with_its_figures(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    output = EagleConverter().convert(GOLDEN / PLAIN, tmp_path / "out", "org/verifier")
    report = write_report(tmp_path / "report", str(output))
    run = speculators("publish", output, "org/draft", "--report", report)
    assert run.status == 0
    assert f"Valid: {output}" in run.messages
    assert not [line for line in run.messages if line.startswith("The report is about")]
    assert FIGURES in published(server)
    assert files_of(server.content("org/draft")) == sorted([*PUBLISHED, "report.json"])
    assert read_report(server.content("org/draft")) == read_report(report)

    # The figures stay when it is published again.
    assert speculators("publish", output, "org/other").status == 0
    assert FIGURES in published(server, "org/other")
    assert "vllm serve org/other" in published(server, "org/other")


def test_the_figures_of_another_draft_are_remarked(
    tmp_path: Path, server: HubServer, speculators: CommandLine, converted: dict[str, Path]
) -> None:
    output = shutil.copytree(converted[PLAIN], tmp_path / "out")
    report = write_report(tmp_path / "report", "org/another")
    run = speculators("publish", output, "org/draft", "--report", report / "report.json")
    assert run.status == 0
    assert f"The report is about org/another: make sure that it is {output}" in run.messages


def test_a_users_card_is_published_as_it_is(
    tmp_path: Path, server: HubServer, speculators: CommandLine, converted: dict[str, Path]
) -> None:
    output = shutil.copytree(converted[PLAIN], tmp_path / "out")
    card = "---\nlicense: mit\n---\n# Mine\n"
    (output / "README.md").write_text(card)
    run = speculators("publish", output, "org/draft")
    assert run.status == 0
    assert published(server) == (output / "README.md").read_text() == card
    assert (
        f"{output / 'README.md'} was written or edited by somebody, and is published as it is"
        in run.messages
    )


def test_a_verifier_that_nobody_else_has_is_remarked(
    tmp_path: Path, server: HubServer, speculators: CommandLine, verifier: Path
) -> None:
    output = EagleConverter().convert(GOLDEN / PLAIN, tmp_path / "out", verifier)
    run = speculators("publish", output, "org/draft")
    assert run.status == 0
    assert (
        f"The verifier is not named by a Hugging Face id but by {verifier}: whoever downloads "
        "org/draft has to say which it is, and the card has ORGANIZATION/VERIFIER in its place"
        in run.messages
    )
    assert str(verifier) not in published(server)


def test_the_card_of_a_conversion(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    """It names no repository yet; publishing writes it for the one that is given."""
    output = EagleConverter().convert(GOLDEN / PLAIN, tmp_path / "out", "org/verifier")
    card = (output / "README.md").read_text()
    assert is_stamped(card)
    assert metadata_of(card)["base_model"] == "org/verifier"
    assert "ORGANIZATION/DRAFT" in card
    assert "README.md" not in json.loads((output / "conversion.json").read_text())["files"]
    assert speculators("publish", output, "org/draft").status == 0
    assert "ORGANIZATION/DRAFT" not in published(server)
    assert 'from_pretrained("org/draft"' in published(server)


def test_an_edited_card_outlives_the_draft_that_is_replaced(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    output = EagleConverter().convert(GOLDEN / PLAIN, tmp_path / "out", "org/verifier")
    written = (output / "README.md").read_text()
    again = ["convert", "eagle", GOLDEN / PLAIN, output, "org/verifier", "--overwrite"]
    edited = written.replace("---\n", "---\nlicense: mit\n", 1)
    (output / "README.md").write_text(edited)
    run = speculators(*again, "--no-validate")
    assert run.status == 0
    assert (output / "README.md").read_text() == edited
    assert any("README.md was written or edited by somebody, and is kept" in it
               for it in run.messages)  # fmt: skip
    run = speculators("publish", output, "org/draft", "--dry-run")
    assert run.status == 0
    assert any("still has ORGANIZATION/DRAFT in it" in it for it in run.messages)
    assert edited.splitlines()[5] in run.stdout

    (output / "README.md").write_text(written)
    assert speculators(*again, "--dtype", "bf16", "--no-validate").status == 0
    assert "bfloat16" in (output / "README.md").read_text()


def files_shown(run: Run) -> list[str]:
    """The names in the first column of the files that a dry run lists."""
    listed = run.stdout.split("\n\n")[1].splitlines()[1:]
    return [line.split()[0] for line in listed]


def test_a_dry_run_shows_what_would_be_uploaded(
    tmp_path: Path,
    server: HubServer,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    converted: dict[str, Path],
) -> None:
    """It needs no token, and neither writes nor uploads anything."""
    output = EagleConverter().convert(GOLDEN / PLAIN, tmp_path / "out", "org/verifier")
    report = write_report(tmp_path / "report", str(output))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN="")
    arguments = ["publish", output, "org/draft", "--report", report]
    run = speculators(*arguments, "--dry-run")
    assert run.status == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "org/draft" not in server.repos

    patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN=MEMBER)
    assert speculators(*arguments).status == 0
    there = files_of(server.content("org/draft"))
    assert [".gitattributes", *files_shown(run)] == there
    assert published(server).rstrip() in run.stdout


def test_where_and_how_it_is_committed(
    tmp_path: Path, server: HubServer, speculators: CommandLine, converted: dict[str, Path]
) -> None:
    output = shutil.copytree(converted[PLAIN], tmp_path / "out")
    run = speculators(
        "publish", output, "org/draft", "--revision", "v2", "--commit-message", "The second"
    )
    assert run.status == 0
    assert "model.safetensors" in files_of(server.content("org/draft", "v2"))
    assert "model.safetensors" not in files_of(server.content("org/draft"))
    assert server.messages[-1] == "The second"
    run = speculators("publish", output, "org/draft", "--create-pr")
    assert run.status == 0
    assert "/discussions/" in run.messages[-1]
    assert "model.safetensors" not in files_of(server.content("org/draft"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{out}", "org/a/b"], "'org/a/b' is not a Hub id"),
        (["{out}", "org/draft", "--revision", "a b"], "'a b' cannot be the name of a branch"),
        (["{out}", "org/draft", "--report", "none"], "none cannot be read"),
        (["./none", "org/draft"], "none does not exist"),
        (["{source}", "org/draft"], "Convert the checkpoint first"),
    ],
)
def test_names_are_checked_before_the_token(
    tmp_path: Path,
    server: HubServer,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    converted: dict[str, Path],
    arguments: list[str],
    expected: str,
) -> None:
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN="")
    places = {"out": converted[PLAIN], "source": GOLDEN / PLAIN}
    run = speculators("publish", *(it.format(**places) for it in arguments))
    assert run.status == 1
    assert expected in run.errors[0]


def test_a_damaged_draft_is_not_published(
    tmp_path: Path, server: HubServer, speculators: CommandLine, converted: dict[str, Path]
) -> None:
    output = shutil.copytree(converted[PLAIN], tmp_path / "out")
    weights = bytearray((output / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (output / "model.safetensors").write_bytes(weights)
    run = speculators("publish", output, "org/draft")
    assert run.status == 1
    assert "is not the file that was written" in run.errors[0]
    assert "org/draft" not in server.repos


def test_what_cannot_be_validated_is_not_published(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors["fc.weight"].fill_(torch.nan)
    )
    run = speculators(
        "convert", "eagle", source, tmp_path / "out", "org/verifier", "--push-to-hub", "org/draft"
    )
    assert run.status == 1
    assert not (tmp_path / "out").exists()
    assert "org/draft" not in server.repos


def test_a_failed_upload_leaves_the_output(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    server.fail("commit", "POST", status=403)
    output = tmp_path / "out"
    run = speculators(
        "convert", "eagle", GOLDEN / PLAIN, output, "org/verifier", "--push-to-hub", "org/draft"
    )
    assert run.status == 1
    assert len(run.errors) == 1
    assert run.errors[0].endswith(
        f"The draft in {output} is complete; publish it later: "
        f"speculators publish {output} org/draft"
    )
    EagleConverter().validate(output)
    server.faults.clear()
    assert speculators("publish", output, "org/draft").status == 0


@pytest.mark.parametrize("token", ["", STRANGER])
def test_who_may_not_write_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    server: HubServer,
    speculators: CommandLine,
    token: str,
) -> None:
    """A missing token is reported before anything is converted."""
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN=token)
    run = speculators(
        "convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", "org/verifier",
        "--push-to-hub", "org/draft",
    )  # fmt: skip
    assert run.status == 1
    assert (tmp_path / "out").exists() == bool(token)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--private"], "--private and --report only work with --push-to-hub."),
        (["--report", "x"], "--private and --report only work with --push-to-hub."),
        (["--push-to-hub", "org/draft", "--no-validate"], "what is published has to be validated"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    speculators: CommandLine, options: list[str], expected: str
) -> None:
    run = speculators("convert", "eagle", "in", "out", "base", *options)
    assert run.status == 2
    assert expected in " ".join(run.stderr.replace("│", " ").split())


def test_a_dry_run_looks_for_the_token_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN="")
    run = speculators(
        "convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", "org/verifier",
        "--push-to-hub", "org/draft", "--dry-run",
    )  # fmt: skip
    assert run.status == 1
    assert "needs an access token" in run.errors[0]


def test_a_wrong_report_is_told_before_anything_is_converted(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    run = speculators(
        "convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", "org/verifier",
        "--push-to-hub", "org/draft", "--report", tmp_path,
    )  # fmt: skip
    assert run.status == 1
    assert len(run.errors) == 1
    assert run.errors[0].startswith(
        f"{tmp_path / 'report.json'} cannot be read (No such file or directory); give what"
    )
    assert not (tmp_path / "out").exists()


def test_publishing_twice_in_a_batch_sends_nothing(
    tmp_path: Path, server: HubServer, speculators: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_processes(monkeypatch)
    manifest = tmp_path / "batch.json"
    entry = {
        "input": str(GOLDEN / PLAIN),
        "output": "out",
        "base_model": "org/verifier",
        "push_to_hub": "org/draft",
        "report": "report",
    }
    write_report(tmp_path / "report", str(tmp_path / "out"))
    manifest.write_text(json.dumps([entry]))
    server.fail("commit", "POST", status=403, times=1)
    failed = speculators("convert", "eagle", "--manifest", manifest)
    assert (failed.status, failed.stdout.splitlines()[-1]) == (1, "1 failed.")
    run = speculators("convert", "eagle", "--manifest", manifest)
    assert (run.status, run.stdout.splitlines()[-1]) == (0, "1 done before.")
    commit = server.repos["org/draft"].refs["main"]
    assert run.stdout.splitlines()[1].endswith(f"{server.url}/org/draft/commit/{commit}")
    assert FIGURES in published(server)
    assert speculators("convert", "eagle", "--manifest", manifest).status == 0
    assert server.repos["org/draft"].refs["main"] == commit


# The report


def test_the_section_of_a_report(tmp_path: Path) -> None:
    section = evaluation_section(read_report(write_report(tmp_path / "report", "draft")))
    how, empty, heads, alignment, *rows = section.splitlines()
    assert how == (
        "Measured by speculators 1.0.0 on 2 prompts that come with speculators, decoding greedily "
        "up to 20 new tokens, in float32 on cpu (1 thread), one prompt at a time, with torch "
        "2.13.0 and transformers 5.19.0; the speeds hold for that only. The acceptance "
        "length is the mean number of tokens that one pass of the verifier gives."
    )
    assert (empty, rows) == ("", [FIGURES])
    assert heads.count("|") == alignment.count("|") == FIGURES.count("|")
    stopped = read_report(write_report(tmp_path / "stopped", "draft", complete=False))
    assert "stopped before all 80 prompts were measured." in evaluation_section(stopped)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "Invalid JSON"),
        ("{}", "speculators_version: Field required."),
        ("[]", "Input should be an object"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(EvaluationError) as caught:
        read_report(file)
    assert str(caught.value).startswith(f"{file} is not a report of 'speculators evaluate': ")
    assert expected in str(caught.value)


# By the model


@pytest.fixture
def draft(tmp_path: Path, server: HubServer) -> EagleSpeculator:
    output = EagleConverter().convert(
        GOLDEN / PLAIN, tmp_path / "converted", "org/verifier", validate=False
    )
    return EagleSpeculator.from_pretrained(output)


def test_save_pretrained_writes_a_card(tmp_path: Path, draft: EagleSpeculator) -> None:
    draft.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == ["README.md", "config.json", "model.safetensors"]
    saved = (tmp_path / "saved" / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in stored_tensors(tmp_path / "saved").values())
    assert f"| parameters | {parameters:,}, in float32 |" in saved
    assert metadata_of(saved)["base_model"] == "org/verifier"


def test_save_pretrained_keeps_a_users_card(tmp_path: Path, draft: EagleSpeculator) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text("mine")
    draft.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"
    draft.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1" / "README.md").exists()


def test_push_to_hub(tmp_path: Path, server: HubServer, draft: EagleSpeculator) -> None:
    url = draft.push_to_hub(
        "org/pushed", private=True, commit_message="Mine", tags=["mine"], max_shard_size="100KB"
    )
    assert url.startswith(f"{server.url}/org/pushed/commit/")
    assert server.repos["org/pushed"].private
    assert "model.safetensors.index.json" in files_of(server.content("org/pushed"))
    assert "mine" in metadata_of(published(server, "org/pushed"))["tags"]
    again = EagleSpeculator.from_pretrained("org/pushed")
    for name, parameter in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter)

    draft.push_to_hub("org/pushed")
    assert files_of(server.content("org/pushed")) == [
        ".gitattributes", "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip


def test_what_the_conversion_told_is_not_told_of_a_saved_model(
    server: HubServer, draft: EagleSpeculator, tmp_path: Path
) -> None:
    """The files of a saved model are not those of the conversion."""
    server.add_repo("org/draft", tmp_path / "converted")
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "converted", saved)
    draft.save_pretrained(saved, push_to_hub=True, repo_id="org/draft")
    assert (saved / "conversion.json").exists()
    assert files_of(server.content("org/draft")) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_save_pretrained_pushes_too(
    tmp_path: Path, server: HubServer, draft: EagleSpeculator
) -> None:
    draft.save_pretrained(tmp_path / "draft", push_to_hub=True)
    assert (tmp_path / "draft" / "README.md").read_text() == published(server, "member/draft")
    draft.save_pretrained(tmp_path / "draft", push_to_hub=True, repo_id="org/x", revision="dev")
    assert "README.md" in files_of(server.content("org/x", "dev"))
    assert "README.md" not in files_of(server.content("org/x"))
    with pytest.raises(HubError, match="rejects the access token"):
        draft.push_to_hub("org/pushed", token="hf_unknownToEverybody")


# For real


@pytest.mark.skipif(not REAL_VERIFIER.is_dir(), reason="make test makes the verifier")
@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_code_of_the_card_runs(
    tmp_path: Path,
    server: HubServer,
    speculators: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    alone: bool,
) -> None:
    """Run it with a real draft and its verifier, where there is only the Hub.

    Exhaustive: in a process of its own, which imports torch.
    """
    server.add_repo("org/smollm2", REAL_VERIFIER)
    run = speculators(
        "convert", "eagle", ROOT / "examples" / "smollm2-135m-eagle1", tmp_path / "out",
        "org/smollm2", "--push-to-hub", "org/draft",
    )  # fmt: skip
    assert run.status == 0, run.stderr
    _, code = published(server).split("```python\n")
    code = code.split("```")[0]
    if alone:
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ
            | hub_environment(server, tmp_path / "fresh")
            | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        patch_hub(monkeypatch, server, tmp_path / "fresh")
        monkeypatch.chdir(tmp_path)
        with redirect_stdout(StringIO()) as stdout:
            exec(code, {"__name__": "__main__"})
        printed = stdout.getvalue()
    assert "The capital of France is Paris" in printed
