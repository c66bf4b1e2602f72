"""`speculators inspect` of a Hub id: headers are fetched, weights never."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (
    GOLDEN,
    GOLDEN_NAMES,
    PLAIN,
    CommandLine,
    Tensors,
    run_process,
    source_tensors,
    write_checkpoint,
    write_shards,
)
from hub_server import HubServer, hub_environment, patch_hub
from speculators.checkpoint.hub.repository import HubRepository

LARGE = 3 << 20
"""The elements of a tensor that makes a checkpoint much larger than its headers."""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path) -> None:
    patch_hub(monkeypatch, server, cache)


def larger(tensors: Tensors) -> None:
    """Add a tensor of 12 MB to a checkpoint, which therefore cannot be converted."""
    tensors["layers.0.mlp.extra"] = torch.zeros(LARGE)


def bytes_asked_for(server: HubServer) -> int:
    """The bytes requested by all requests for weights; one without a range counts as too much."""
    asked = 0
    for request in server.requests:
        if request.method == "GET" and "/cdn" in request.path:
            first, _, last = (request.range or "bytes=0-99999999999")[6:].partition("-")
            asked += int(last) - int(first) + 1
    return asked


def told(run: CommandLine, source: str | Path) -> dict[str, Any]:
    done = run("inspect", source, "--json")
    assert (done.status, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    found.pop("name")
    found["conversion"].pop("command")
    why_not = found["conversion"].pop("why_not")
    found["conversion"]["why_not"] = why_not and why_not.replace(str(source), "SOURCE")
    return found


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_same_is_told_as_of_a_directory(
    server: HubServer, speculators: CommandLine, name: str
) -> None:
    server.add_repo("org/draft", GOLDEN / name)
    assert told(speculators, "org/draft") == told(speculators, GOLDEN / name)


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_the_weights_are_not_fetched(
    tmp_path: Path, server: HubServer, speculators: CommandLine, cache: Path, container: str
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=larger, container=container)
    server.add_repo("org/draft", source)
    found = told(speculators, "org/draft")
    assert found == told(speculators, source)
    assert found["bytes"] > 12_000_000
    assert 0 < bytes_asked_for(server) < 200_000
    # The client caches an empty file for each file that does not exist.
    assert max(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 10_000


def test_a_zip_with_many_entries(
    tmp_path: Path, server: HubServer, speculators: CommandLine
) -> None:
    """Its directory and its pickle are longer than the bytes that are read first."""

    def many(tensors: Tensors) -> None:
        for index in range(1500):
            tensors[f"layers.{index}.mlp.up_proj.weight"] = torch.zeros(16, 16)

    source = write_checkpoint(tmp_path / "source", edit=many, container="pytorch_model.bin")
    server.add_repo("org/model", source)
    assert told(speculators, "org/model") == told(speculators, source)


def test_a_long_header(tmp_path: Path, server: HubServer, speculators: CommandLine) -> None:
    def many(tensors: Tensors) -> None:
        for index in range(1500):
            tensors[f"layers.{index}.mlp.up_proj.weight"] = torch.zeros(256)

    source = write_checkpoint(tmp_path / "source", edit=many)
    server.add_repo("org/model", source)
    assert told(speculators, "org/model") == told(speculators, source)
    assert bytes_asked_for(server) < 300_000 < (source / "model.safetensors").stat().st_size


def test_shards(tmp_path: Path, server: HubServer, speculators: CommandLine) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    tensors = source_tensors()
    names = sorted(tensors)
    write_shards(
        source,
        {
            "a.safetensors": {name: tensors[name] for name in names[:5]},
            "b.safetensors": {name: tensors[name] for name in names[5:]},
        },
    )
    server.add_repo("org/draft", source)
    assert told(speculators, "org/draft") == told(speculators, source)


def test_what_is_in_the_cache_is_not_asked_for_again(
    server: HubServer, speculators: CommandLine
) -> None:
    server.add_repo("org/draft", GOLDEN / PLAIN)
    assert HubRepository("org/draft").file("model.safetensors") is not None
    server.requests.clear()
    told(speculators, "org/draft")
    assert bytes_asked_for(server) == 0


@pytest.mark.parametrize("where", ["legacy", "no ranges"])
def test_what_only_a_download_would_tell_is_said_and_not_downloaded(
    tmp_path: Path, server: HubServer, speculators: CommandLine, where: str, cache: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", container="pytorch_model.bin")
    if where == "legacy":
        torch.save(
            source_tensors(), source / "pytorch_model.bin", _use_new_zipfile_serialization=False
        )
    else:
        server.fail("pytorch_model.bin", whole=True)
    server.add_repo("org/draft", source)
    run = speculators("inspect", "org/draft", "--json")
    assert run.status == 0
    found = json.loads(run.stdout)
    assert found["kind"] == "eagle"
    assert found["evidence"] == ["config.json says num_hidden_layers 1"]
    assert found["tensors"] == []
    assert "cannot be inspected without downloading all of it" in found["notes"][0]
    assert not list(cache.rglob("pytorch_model.bin"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is truncated"),
    "a web page": (
        lambda path: path.write_text("<!doctype html>" + " " * 100_000),
        "is a web page",
    ),
    "a header that is longer than the file": (
        lambda path: path.write_bytes(b"\xff" * 7 + b"\x00" + bytes(200_000)),
        "its header should take",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_called_by_its_name_on_the_hub(
    tmp_path: Path, server: HubServer, speculators: CommandLine, case: str
) -> None:
    spoil, pattern = DAMAGE[case]
    source = write_checkpoint(tmp_path / "source")
    spoil(source / "model.safetensors")
    server.add_repo("org/draft", source)
    run = speculators("inspect", "org/draft")
    assert (run.status, run.stdout) == (1, "")
    assert len(run.errors) == 1
    assert re.search(f"^org/draft/model.safetensors .*{pattern}", run.errors[0])


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.update({"fc.weight": torch.ones(64, 127)}),
        lambda tensors: tensors.update({"layers.0.mlp.up_proj.weight": torch.ones(3, 64)}),
    ],
)
def test_why_it_cannot_be_converted_is_told_in_its_names_on_the_hub(
    tmp_path: Path, server: HubServer, speculators: CommandLine, edit: Callable[[Tensors], None]
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=edit)
    server.add_repo("org/draft", source)
    found = told(speculators, "org/draft")
    assert found == told(speculators, source)
    assert found["conversion"]["why_not"].startswith("SOURCE/model.safetensors: ")


@pytest.mark.parametrize("at", [0, 40, 1000, -30])
def test_a_damaged_zip(
    tmp_path: Path, server: HubServer, speculators: CommandLine, at: int
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=larger, container="pytorch_model.bin")
    data = bytearray((source / "pytorch_model.bin").read_bytes())
    data[at : (at + 8) or None] = b"\xff" * 8
    (source / "pytorch_model.bin").write_bytes(data)
    server.add_repo("org/draft", source)
    here, there = speculators("inspect", source), speculators("inspect", "org/draft")
    if at:  # otherwise no reader takes it for a zip, and only a download would tell what it is
        assert here.status == there.status == 1
        assert there.errors == [it.replace(str(source), "org/draft") for it in here.errors]


def test_a_repository_that_is_not_there(server: HubServer, speculators: CommandLine) -> None:
    run = speculators("inspect", "org/drafft")
    assert run.status == 1
    assert run.errors[0].startswith("There is no public repository 'org/drafft'")


def test_a_revision(tmp_path: Path, server: HubServer, speculators: CommandLine) -> None:
    server.add_repo("org/draft", GOLDEN / PLAIN)
    server.add_repo("org/draft", GOLDEN / "ttt_layernorms", revision="norms")
    run = speculators("inspect", "org/draft", "--revision", "norms")
    assert "org/draft: an EAGLE-1 or EAGLE-2 draft with extra layernorms" in run.stdout


def test_in_a_process_offline(server: HubServer, cache: Path) -> None:
    server.add_repo("org/draft", GOLDEN / PLAIN)
    online = hub_environment(server, cache)
    assert run_process("inspect", "org/draft", cwd=None, **online).status == 0
    offline = online | {"HF_HUB_OFFLINE": "1"}
    run = run_process("inspect", "org/draft", cwd=None, **offline)
    # config.json is in the cache now, and the weights are not.
    assert run.status == 0
    assert "is judged by its config.json alone" in run.stdout
