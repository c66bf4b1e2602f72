"""Single tensors of a file on the Hub: their bytes are fetched, and no others."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

from hub_server import MEMBER, HubServer, patch_hub, skip_waits
from speculators.checkpoint.hub import repository as hub
from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.hub.ranges import read_range
from speculators.checkpoint.hub.repository import HubRepository
from speculators.checkpoint.reader import read_tensors
from speculators.errors import CheckpointError, HubError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TENSORS = {
    HEAD: torch.rand(320, 64),
    EMBEDDING: torch.rand(320, 64).bfloat16(),
    "empty": torch.empty(0, 3),
    **{f"model.layers.{i}.mlp.up_proj.weight": torch.rand(256, 64) for i in range(20)},
}
FILE = "model.safetensors"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "verifier"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file(TENSORS, directory / FILE)
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _patched(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, directory: Path, cache: Path
) -> None:
    patch_hub(monkeypatch, server, cache)
    server.add_repo("org/verifier", directory)


def fetch(*names: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    part = HubRepository("org/verifier", HubAccess(cache_dir), revision=revision).part(FILE, names)
    assert part is not None
    return part


def assert_holds(part: Path, *names: str) -> None:
    found = load_file(part)
    assert found.keys() == set(names)
    for name in names:
        assert torch.equal(found[name], TENSORS[name])


def ranges(server: HubServer) -> list[int]:
    """The number of bytes that each request asked for; 0 if it asked for the whole file."""
    found = []
    for request in server.requests:
        if request.method == "GET" and request.path.startswith("/cdn"):
            first, _, last = (request.range or "bytes=1-0")[6:].partition("-")
            found.append(int(last) - int(first) + 1)
    return found


def test_only_the_bytes_of_the_tensors_are_fetched(
    server: HubServer, directory: Path, cache: Path
) -> None:
    part = fetch(HEAD, "language_model.lm_head.weight")
    assert_holds(part, HEAD)
    assert ranges(server) == [hub.HEADER_GUESS, 320 * 64 * 4]
    assert part.is_relative_to(cache / "assets" / "speculators" / "org--verifier")
    assert sorted(path.suffix for path in part.parent.iterdir()) == [".lock", ".safetensors"]
    assert not list((cache / "hub").rglob(FILE))


def test_a_token_that_is_given(server: HubServer, directory: Path, tmp_path: Path) -> None:
    """It is sent with every request, whatever the environment has."""
    server.add_repo("org/private", directory, private=True)
    with pytest.raises(HubError, match="set HF_TOKEN if the repository is private"):
        HubRepository("org/private", HubAccess(tmp_path / "none")).part(FILE, [HEAD])
    part = HubRepository("org/private", HubAccess(token=MEMBER)).part(FILE, [HEAD])
    assert part is not None
    assert_holds(part, HEAD)
    assert ranges(server)[-1] == 320 * 64 * 4


def test_several_tensors_in_one_file(server: HubServer) -> None:
    assert_holds(fetch(EMBEDDING, "empty", HEAD), HEAD, EMBEDDING, "empty")
    assert len(ranges(server)) == 3


def test_none_of_the_tensors(server: HubServer) -> None:
    assert_holds(fetch("x"))
    assert len(ranges(server)) == 1


def test_the_second_time_comes_from_the_cache(server: HubServer) -> None:
    first = fetch(HEAD)
    modified = first.stat().st_mtime_ns
    server.requests.clear()
    assert fetch(HEAD) == first
    assert first.stat().st_mtime_ns == modified
    assert [request.method for request in server.requests] == ["HEAD"]
    assert fetch(EMBEDDING) != first


def test_a_header_longer_than_guessed(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, directory: Path
) -> None:
    monkeypatch.setattr(hub, "HEADER_GUESS", 100)
    assert_holds(fetch(HEAD), HEAD)
    header = (directory / FILE).stat().st_size - sum(t.nbytes for t in TENSORS.values())
    assert ranges(server) == [100, header, 320 * 64 * 4]


def test_a_file_shorter_than_guessed(
    server: HubServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HEADER_GUESS", 1 << 30)
    assert_holds(fetch(HEAD), HEAD)


def test_a_file_that_the_repository_lacks(server: HubServer) -> None:
    repository = HubRepository("org/verifier")
    assert repository.part("model-00001-of-00002.safetensors", [HEAD]) is None
    assert repository.file("config.json") is not None
    assert repository.part("model-00001-of-00002.safetensors", [HEAD]) is None


def test_a_whole_file_in_the_cache_is_used(server: HubServer, cache: Path) -> None:
    whole = HubRepository("org/verifier").file(FILE)
    server.requests.clear()
    assert fetch(HEAD) == whole
    assert ranges(server) == []
    assert not list(cache.glob("assets/**/*.safetensors"))


def test_the_reader_asks_for_parts(server: HubServer) -> None:
    repository = HubRepository("org/verifier")
    (info,) = read_tensors(repository, only=(HEAD,)).values()
    assert (info.name, info.shape) == (HEAD, (320, 64))
    assert sum(ranges(server)) < 320 * 64 * 4 + hub.HEADER_GUESS + 1
    assert read_tensors(repository).keys() == TENSORS.keys()
    assert ranges(server)[-1] == 0


def test_a_revision_and_a_cache_directory(
    server: HubServer, directory: Path, tmp_path: Path, cache: Path
) -> None:
    older = tmp_path / "older"
    older.mkdir()
    save_file({HEAD: torch.zeros(2, 2)}, older / FILE)
    commit = server.add_repo("org/verifier", older, revision="v1")
    part = fetch(HEAD, revision="v1", cache_dir=tmp_path / "mine")
    assert torch.equal(load_file(part)[HEAD], torch.zeros(2, 2))
    assert part.parent == tmp_path / "mine" / "assets" / "speculators" / "org--verifier" / commit
    assert not cache.exists()
    assert_holds(fetch(HEAD), HEAD)


def test_a_token_is_sent_to_the_hub_alone(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, directory: Path, cache: Path
) -> None:
    server.add_repo("org/gated", directory, gated=True)
    with pytest.raises(HubError, match="is gated and no access token was sent"):
        HubRepository("org/gated").part(FILE, [HEAD])
    patch_hub(monkeypatch, server, cache, HF_TOKEN=MEMBER)
    server.requests.clear()
    part = HubRepository("org/gated").part(FILE, [HEAD])
    assert part is not None
    assert_holds(part, HEAD)
    for request in server.requests:
        assert (request.authorization is None) == request.path.startswith("/cdn")


def test_offline(monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path) -> None:
    repository = HubRepository("org/verifier")
    repository.file("config.json")
    part = repository.part(FILE, [HEAD])
    patch_hub(monkeypatch, server, cache, HF_HUB_OFFLINE="1")
    server.requests.clear()
    repository = HubRepository("org/verifier")
    repository.file("config.json")
    assert repository.part(FILE, [HEAD]) == part
    assert repository.part(FILE, [EMBEDDING]) is None
    with pytest.raises(HubError, match="offline mode forbids fetching"):
        HubRepository("org/other").part(FILE, [HEAD])
    assert not server.requests


# What goes wrong


def test_a_server_without_ranges_sends_the_whole_file(
    server: HubServer, directory: Path, cache: Path
) -> None:
    server.fail(FILE, whole=True)
    part = fetch(HEAD)
    assert part.read_bytes() == (directory / FILE).read_bytes()
    assert part.is_relative_to(cache / "hub")
    assert len(ranges(server)) == 2


def test_a_cut_download_is_resumed(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    waits = skip_waits(monkeypatch)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    server.fail(FILE, cut=True, times=3)
    assert_holds(fetch(HEAD), HEAD)
    size = 320 * 64 * 4
    assert ranges(server) == [hub.HEADER_GUESS] * 4 + [size]
    assert waits == [1, 2, 4]


def test_a_tensor_that_is_cut_is_resumed(
    monkeypatch: pytest.MonkeyPatch, server: HubServer
) -> None:
    waits = skip_waits(monkeypatch)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)

    def and_then_cut(*arguments: Any) -> tuple[bytes, int] | None:
        found = read_range(*arguments)
        server.fail(FILE, cut=True, times=2)
        return found

    monkeypatch.setattr(hub, "read_range", and_then_cut)
    assert_holds(fetch(HEAD), HEAD)
    size = 320 * 64 * 4
    assert ranges(server) == [hub.HEADER_GUESS, size, size // 2, size // 4]
    assert waits == [1, 1]


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_in_trouble_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, status: int
) -> None:
    waits = skip_waits(monkeypatch)
    server.fail(FILE, status=status, times=2)
    assert_holds(fetch(HEAD), HEAD)
    assert 0 < sum(waits) < 10


def test_a_server_in_trouble_for_good(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    waits = skip_waits(monkeypatch)
    server.fail(FILE, status=503)
    with pytest.raises(HubError, match=r"503 Service Unavailable\): try again later"):
        fetch(HEAD)
    assert sum(waits) < 60


def test_a_part_that_is_always_cut_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path
) -> None:
    skip_waits(monkeypatch)
    server.fail(FILE, cut=True)
    with pytest.raises(HubError, match=r"cannot be fetched from .*peer closed connection"):
        fetch(HEAD)
    assert not [path for path in cache.rglob("*") if path.suffix in {".safetensors", ".incomplete"}]


def test_a_damaged_header(server: HubServer, directory: Path) -> None:
    data = bytearray((directory / FILE).read_bytes())
    data[8:12] = b"}}}}"
    (directory / FILE).write_bytes(data)
    server.add_repo("org/verifier", directory)
    with pytest.raises(
        CheckpointError, match=r"^org/verifier/model\.safetensors is not a safetensors file"
    ):
        fetch(HEAD)


@pytest.mark.parametrize("data", [b"", b"1234"])
def test_a_file_that_is_too_short(server: HubServer, directory: Path, data: bytes) -> None:
    (directory / FILE).write_bytes(data)
    server.add_repo("org/verifier", directory)
    with pytest.raises(CheckpointError, match=r"is empty|it has only 4 bytes"):
        read_tensors(HubRepository("org/verifier"), only=(HEAD,))


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model")

    monkeypatch.setattr(file_download, "http_get", fails)
    with pytest.raises(
        HubError, match=r"No space is left for 'model\.safetensors' of org/verifier"
    ):
        fetch(HEAD)
    assert not [path for path in cache.rglob("*") if path.suffix in {".safetensors", ".incomplete"}]


def test_the_clients_own_tools_do_not_mind(cache: Path) -> None:
    """The client can still scan the Hub's cache, with our parts in the assets cache beside it."""
    fetch(HEAD, cache_dir=cache / "mine")
    HubRepository("org/verifier", HubAccess(cache / "mine")).file("config.json")
    info = huggingface_hub.scan_cache_dir(cache / "mine")
    assert [repo.repo_id for repo in info.repos] == ["org/verifier"]
