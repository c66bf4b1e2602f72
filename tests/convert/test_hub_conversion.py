"""Whole conversions on the command line, with the draft and the verifier on a Hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dflash
from helpers import (
    PLAIN,
    CommandLine,
    config_of,
    entries,
    golden_vectors,
    save_quietly,
    source_tensors,
    stored_tensors,
    tiny_llama,
    write_checkpoint,
    write_shards,
)
from hub_server import MEMBER, HubServer, patch_hub, skip_waits
from speculators.families.dflash.config import MASK_FILE
from speculators.models.eagle import EagleSpeculator

DRAFT, VERIFIER = "org/draft", "org/verifier"
HEAD_BYTES = 320 * 64 * 4


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        patch_hub(monkeypatch, server, cache)
        yield server


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A directory with the files of a draft's repository, and others."""
    directory = write_checkpoint(tmp_path / "draft")
    (directory / "README.md").write_text("# A draft")
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")
    (directory / "optimizer.pt").write_bytes(b"large")
    return directory


@pytest.fixture
def big_verifier(tmp_path: Path) -> Path:
    """A verifier in one file, of which the head is a small part."""
    head = golden_vectors(PLAIN)["lm_head.weight"]
    model = tiny_llama(head, intermediate_size=2048, num_hidden_layers=2)
    directory = save_quietly(model, tmp_path / "big")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(autouse=True)
def _served(server: HubServer, draft: Path, big_verifier: Path) -> None:
    server.add_repo(DRAFT, draft)
    server.add_repo(VERIFIER, big_verifier)


def fetched(server: HubServer, repo_id: str) -> list[str]:
    """The files, or ranges of their bytes, that were requested from one repository."""
    return [
        f"{request.file} {request.range or ''}".strip()
        for request in server.requests
        if request.method == "GET"
        and request.file
        and f"/{repo_id}/" in request.path
        and request.file.endswith(("safetensors", "bin")) == request.path.startswith("/cdn")
    ]


def test_only_what_is_needed_is_fetched(
    tmp_path: Path, server: HubServer, big_verifier: Path, speculators: CommandLine
) -> None:
    run = speculators("convert", "eagle", DRAFT, tmp_path / "out", VERIFIER)
    assert run.status == 0, run.stderr
    assert "Forward pass successful" in run.stderr
    assert "WARNING" not in run.stderr
    assert fetched(server, DRAFT) == ["config.json", "model.safetensors"]
    config, start, head = fetched(server, VERIFIER)
    assert config == "config.json"
    assert start.startswith("model.safetensors bytes=0-")
    first, last = map(int, head.removeprefix("model.safetensors bytes=").split("-"))
    assert last - first + 1 == HEAD_BYTES
    assert config_of(tmp_path / "out")["speculators_config"]["verifier"] == {
        "name_or_path": VERIFIER,
        "architectures": ["LlamaForCausalLM"],
    }
    assert stored_tensors(tmp_path / "out").keys() == source_tensors().keys()


def test_without_validation_no_weights_of_the_verifier_are(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    arguments = ["convert", "eagle", DRAFT, tmp_path / "out", VERIFIER]
    assert speculators(*arguments, "--dry-run").status == 0
    assert speculators(*arguments, "--no-validate").status == 0
    assert fetched(server, VERIFIER) == ["config.json"]
    assert fetched(server, DRAFT) == ["config.json", "model.safetensors"]


def test_of_a_verifier_in_shards_the_head_alone(
    tmp_path: Path, server: HubServer, big_verifier: Path, speculators: CommandLine
) -> None:
    tensors = stored_tensors(big_verifier)
    (big_verifier / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    write_shards(big_verifier, {"a.safetensors": tensors, "b.safetensors": head})
    server.add_repo(VERIFIER, big_verifier)
    run = speculators("convert", "eagle", DRAFT, tmp_path / "out", VERIFIER)
    assert run.status == 0, run.stderr
    assert [file.split()[0] for file in fetched(server, VERIFIER)] == [
        "config.json",
        "model.safetensors.index.json",
        "b.safetensors",
        "b.safetensors",
    ]


def test_both_containers_and_it_is_said(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    run = speculators("convert", "eagle", DRAFT, tmp_path / "out", VERIFIER, "--no-validate")
    said = f"{DRAFT} has model.safetensors and pytorch_model.bin: model.safetensors is read"
    assert said in run.messages


def test_a_bin_in_shards(
    tmp_path: Path, server: HubServer, draft: Path, speculators: CommandLine
) -> None:
    import torch

    directory = tmp_path / "sharded"
    directory.mkdir()
    shutil.copy(draft / "config.json", directory)
    tensors = source_tensors()
    weight_map: dict[str, str] = {}
    for number in range(2):
        shard = f"pytorch_model-0000{number + 1}-of-00002.bin"
        names = list(tensors)[number::2]
        torch.save({name: tensors[name] for name in names}, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = json.dumps({"weight_map": weight_map})
    (directory / "pytorch_model.bin.index.json").write_text(index)
    server.add_repo("org/sharded", directory)
    run = speculators("convert", "eagle", "org/sharded", tmp_path / "out", VERIFIER)
    assert run.status == 0, run.stderr
    stored = stored_tensors(tmp_path / "out")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_a_revision_and_a_cache_directory(
    tmp_path: Path, server: HubServer, draft: Path, cache: Path, speculators: CommandLine
) -> None:
    newer = write_checkpoint(
        tmp_path / "newer", edit=lambda tensors: tensors["fc.weight"].mul_(2.0)
    )
    server.add_repo(DRAFT, newer, revision="v2")
    options = ["--no-validate", "--cache-dir", tmp_path / "mine"]
    for revision, factor in (("v2", 2), ("main", 1)):
        out = tmp_path / revision
        run = speculators(
            "convert", "eagle", DRAFT, out, VERIFIER, "--revision", revision, *options
        )
        assert run.status == 0, run.stderr
        expected = source_tensors()["fc.weight"] * factor
        assert stored_tensors(out)["fc.weight"].equal(expected)
    assert not cache.exists()
    assert "models--org--draft" in entries(tmp_path / "mine")


def test_a_second_time_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: HubServer,
    cache: Path,
    speculators: CommandLine,
) -> None:
    arguments = ["convert", "eagle", DRAFT, tmp_path / "out", VERIFIER]
    assert speculators(*arguments).status == 0
    patch_hub(monkeypatch, server, cache, HF_HUB_OFFLINE="1")
    server.requests.clear()
    run = speculators(*arguments, "--overwrite")
    assert run.status == 0, run.stderr
    assert "WARNING" not in run.stderr
    assert not server.requests


def test_a_gated_verifier_with_the_token(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: HubServer,
    cache: Path,
    big_verifier: Path,
    speculators: CommandLine,
) -> None:
    server.add_repo("meta/verifier", big_verifier, gated=True)
    arguments = ["convert", "eagle", DRAFT, tmp_path / "out", "meta/verifier"]
    run = speculators(*arguments)
    assert run.status == 1
    (error,) = run.errors
    assert error == (
        "meta/verifier is gated and no access token was sent: accept its licence at "
        f"{server.url}/meta/verifier, then set HF_TOKEN or log in with 'hf auth login'."
    )
    assert not (tmp_path / "out").exists()
    patch_hub(monkeypatch, server, cache, HF_TOKEN=MEMBER)
    run = speculators(*arguments)
    assert run.status == 0, run.stderr
    assert MEMBER not in run.stderr


ERRORS = {
    "typo in the draft": ("org/drafft", VERIFIER, "no public repository 'org/drafft'"),
    "typo in the verifier": (DRAFT, "org/verifiar", "no public repository 'org/verifiar'"),
    "no id at all": ("my draft", VERIFIER, "neither an existing directory or file nor a Hub id"),
    "a path that is not there": ("./draft", VERIFIER, "does not exist"),
    "the wrong way round": (VERIFIER, DRAFT, "org/"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence(
    tmp_path: Path, server: HubServer, speculators: CommandLine, case: str
) -> None:
    source, verifier, message = ERRORS[case]
    run = speculators("convert", "eagle", source, tmp_path / "out", verifier)
    assert run.status == 1
    assert len(run.errors) == 1
    assert message in run.errors[0]
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_download_is_no_input(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    server.fail("model.safetensors", "HEAD", etag="0" * 64)
    run = speculators("convert", "eagle", DRAFT, tmp_path / "out", VERIFIER)
    assert run.status == 1
    assert "arrived damaged" in run.errors[0]
    assert not (tmp_path / "out").exists()


def test_a_head_that_cannot_be_had_is_told_and_not_fatal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: HubServer,
    big_verifier: Path,
    speculators: CommandLine,
) -> None:
    skip_waits(monkeypatch)
    (big_verifier / "model.safetensors").unlink()
    server.add_repo(VERIFIER, big_verifier)
    run = speculators("convert", "eagle", DRAFT, tmp_path / "out", VERIFIER)
    assert run.status == 0, run.stderr
    assert any("Logits were not validated" in message for message in run.messages)


def test_a_verifier_that_is_attached_by_its_id_is_kept_in_the_same_cache(
    tmp_path: Path, cache: Path, speculators: CommandLine
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    arguments = (DRAFT, out, VERIFIER, "--no-validate", "--cache-dir", elsewhere)
    assert speculators("convert", "eagle", *arguments).status == 0
    model = EagleSpeculator.from_pretrained(out, verifier=VERIFIER, cache_dir=elsewhere)
    assert model.verifier is not None
    assert list(elsewhere.glob("models--org--verifier/snapshots/*/model.safetensors"))
    assert not list(cache.glob("**/model.safetensors"))


def test_a_draft_with_a_file_beside_its_weights(
    server: HubServer, tmp_path: Path, speculators: CommandLine
) -> None:
    """A DFlash draft's mask embedding is fetched with it."""
    source = dflash.write_draft(tmp_path / "source", dflash.native())
    torch.save({"embedding": torch.ones(64), "mask_token_id": 319}, source / MASK_FILE)
    server.add_repo("org/dflash", source)
    server.add_repo("org/qwen3", dflash.TARGET)
    run = speculators("convert", "auto", "org/dflash", tmp_path / "out", "org/qwen3")
    assert (run.status, run.errors) == (0, [])
    assert (tmp_path / "out" / MASK_FILE).read_bytes() == (source / MASK_FILE).read_bytes()
    assert speculators("inspect", "org/dflash").stdout.count("an embedding of its own") == 2
    assert MASK_FILE in server.fetched


def test_a_published_draft_is_validated_where_it_is(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    run = speculators("convert", "eagle", DRAFT, tmp_path / "out", VERIFIER)
    assert run.status == 0, run.stderr
    server.add_repo("org/converted", tmp_path / "out")
    run = speculators("validate", "org/converted", "--source", DRAFT)
    assert run.status == 0, run.stderr
    assert not [message for message in run.messages if "what was written is not known" in message]
    spoilt = tmp_path / "spoilt"
    shutil.copytree(tmp_path / "out", spoilt)
    record = json.loads((spoilt / "conversion.json").read_text())
    record["files"]["model.safetensors"]["sha256"] = "0" * 64
    (spoilt / "conversion.json").write_text(json.dumps(record))
    server.add_repo("org/spoilt", spoilt)
    run = speculators("validate", "org/spoilt")
    assert run.status == 1
    assert "is not the file that was written" in run.errors[0]
