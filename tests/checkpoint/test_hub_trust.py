"""What the Hub, a proxy or a cache gives is what was announced, or it is refused."""

import base64
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hub_server import HubServer, patch_hub, skip_waits
from speculators.checkpoint.files.safetensors_file import read_safetensors_file
from speculators.checkpoint.headers import headers_only
from speculators.checkpoint.hub import cache as hub_cache
from speculators.checkpoint.hub.errors import hide_secrets
from speculators.checkpoint.hub.repository import HubRepository
from speculators.checkpoint.reader import read_tensors
from speculators.errors import HubError

FILE = "model.safetensors"
TENSORS = {"lm_head.weight": torch.rand(320, 64), "norm.weight": torch.rand(64)}
both = pytest.mark.parametrize("filename", ["config.json", FILE])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    directory = tmp_path / "draft"
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 1}')
    save_file(TENSORS, directory / FILE)
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        server.add_repo("org/draft", directory)
        yield server


def get(filename: str) -> Path:
    path = HubRepository("org/draft").file(filename)
    assert path is not None
    return path


def told(filename: str) -> str:
    with pytest.raises(HubError) as caught:
        HubRepository("org/draft").file(filename)
    text = str(caught.value)
    assert text.isprintable()
    assert text.endswith(".")
    return text


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def notes(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "assets" / "speculators" / "checked").glob("*"))


# The bytes


@both
def test_what_arrives_damaged_is_deleted(server: HubServer, tmp_path: Path, filename: str) -> None:
    right = (tmp_path / "draft" / filename).read_bytes()
    server.fail(filename, data=damaged(right), times=1)
    text = told(filename)
    kind = "SHA-256" if filename == FILE else "git hash"
    assert f"'{filename}' of org/draft arrived damaged, its {kind} is not the one that" in text
    assert not [it for it in tmp_path.glob("cache/hub/models--*/**/*") if it.name == filename]
    assert get(filename).read_bytes() == right


@both
def test_what_a_killed_run_left_is_checked(
    server: HubServer, tmp_path: Path, filename: str, log: list[str]
) -> None:
    """It was downloaded, and the run was killed before it compared the hash."""
    right = (tmp_path / "draft" / filename).read_bytes()
    path = get(filename)
    path.resolve().write_bytes(damaged(right))
    for note in notes(tmp_path):
        note.unlink()
    assert get(filename).read_bytes() == right
    assert f"INFO {path} is damaged, and is fetched again" in log


@both
def test_a_cached_file_that_was_cut_off_is_fetched_again(
    server: HubServer, tmp_path: Path, filename: str
) -> None:
    right = (tmp_path / "draft" / filename).read_bytes()
    os.truncate(get(filename).resolve(), 5)
    assert get(filename).read_bytes() == right
    os.truncate(get(filename).resolve(), 0)
    with headers_only(HubRepository("org/draft")) as light:  # as `inspect` reads it
        found = light.file(filename)
    if filename == FILE:
        assert found is not None
        assert read_safetensors_file(found).keys() == TENSORS.keys()


def test_a_cached_file_that_stays_damaged(server: HubServer, tmp_path: Path) -> None:
    right = (tmp_path / "draft" / FILE).read_bytes()
    path = get(FILE)
    path.resolve().write_bytes(b"x" * len(right))
    server.fail(FILE, data=damaged(right), times=1)
    assert "arrived damaged" in told(FILE)
    assert get(FILE).read_bytes() == right


@both
def test_a_damaged_file_offline(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, tmp_path: Path, filename: str
) -> None:
    path = get(filename)
    path.resolve().write_bytes(damaged(path.read_bytes()))
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_HUB_OFFLINE="1")
    text = told(filename)
    assert "is damaged in the cache" in text
    assert "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE" in text
    assert path.exists()


def test_what_was_found_right_is_not_hashed_again(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, tmp_path: Path
) -> None:
    hashed: list[str] = []
    for length, kind in hub_cache.HASHES.items():

        def digests(blob: Path, kind: hub_cache._Kind = kind) -> set[str]:
            hashed.append(kind.name)
            return kind.digests(blob)

        monkeypatch.setitem(hub_cache.HASHES, length, kind._replace(digests=digests))
    for _ in range(3):
        get("config.json")
        get(FILE)
    assert hashed == ["git hash", "SHA-256"]
    get(FILE).resolve().touch()
    get(FILE)
    assert hashed == ["git hash", "SHA-256", "SHA-256"]


def test_the_plain_sha1_of_a_proxy_is_right_too(server: HubServer, tmp_path: Path) -> None:
    digest = hashlib.sha1((tmp_path / "draft" / "config.json").read_bytes()).hexdigest()
    server.fail("config.json", "HEAD", etag=digest)
    assert get("config.json").resolve().name == digest


# Ranges of bytes


@pytest.mark.parametrize("after", [0, 1])
def test_another_range_than_was_asked_for(server: HubServer, after: int) -> None:
    """Of the header, and of a tensor."""
    server.fail(FILE, times=after)  # no fault at first
    server.fail(FILE, shift=1 if after else -0 or 3)
    with pytest.raises(HubError, match=r"sends the wrong bytes of 'model\.safetensors' of org/dr"):
        HubRepository("org/draft").part(FILE, ["norm.weight"])


def test_a_part_that_was_cut_off_is_fetched_again(server: HubServer) -> None:
    part = HubRepository("org/draft").part(FILE, ["norm.weight"])
    assert part is not None
    os.truncate(part, part.stat().st_size - 1)
    again = HubRepository("org/draft").part(FILE, ["norm.weight"])
    assert again == part
    assert torch.equal(load_file(part)["norm.weight"], TENSORS["norm.weight"])


def test_a_whole_file_in_the_cache_is_checked_for_parts_too(
    server: HubServer, tmp_path: Path
) -> None:
    path = get(FILE)
    path.resolve().write_bytes(damaged(path.read_bytes()))
    info = read_tensors(HubRepository("org/draft"), only=["norm.weight"])["norm.weight"]
    assert info.file.read_bytes() == (tmp_path / "draft" / FILE).read_bytes()


# The place


def test_a_path_outside_of_the_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: str(tmp_path / "elsewhere"))
    text = told("config.json")
    assert f"outside of the cache {tmp_path / 'cache' / 'hub'}, in {tmp_path / 'elsewhere'}" in text
    snapshots = tmp_path / "cache" / "hub" / "models--org--draft" / "snapshots"
    up = snapshots / "x" / ".." / ".." / ".." / "elsewhere"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: str(up))
    assert "outside of the cache" in told("config.json")


def test_a_link_out_of_the_cache_is_refused(server: HubServer, tmp_path: Path) -> None:
    path = get("config.json")
    (tmp_path / "elsewhere").write_text('{"secret": 1}')
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert f"in {tmp_path / 'elsewhere'}, so it is not read" in told("config.json")


def test_a_cache_that_is_a_link_is_followed(server: HubServer, tmp_path: Path) -> None:
    get("config.json")
    for place in (
        "cache/hub/models--org--draft/blobs",
        "cache/hub/models--org--draft",
        "cache/hub",
    ):
        moved = (tmp_path / place).rename(tmp_path / f"disk-{place.count('/')}{len(place)}")
        (tmp_path / place).symlink_to(moved)
        assert get("config.json").read_text() == '{"num_hidden_layers": 1}'


# Waiting, and what the client says meanwhile


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_server_that_asks_to_wait_for_long_is_told_of(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, status: int, method: str
) -> None:
    waits = skip_waits(monkeypatch)
    server.fail("config.json", method, status=status, headers={"Retry_After": "7300"})
    text = told("config.json")
    assert f"{server.url} asks to wait for 2 hours before it serves 'config.json' of org/d" in text
    assert waits == []


def test_a_rate_limit_that_ends_late_is_told_of(
    monkeypatch: pytest.MonkeyPatch, server: HubServer
) -> None:
    waits = skip_waits(monkeypatch)
    server.fail("config.json", status=429, headers={"RateLimit": '"api";r=0;t=1800'})
    assert "asks to wait for 1800 seconds" in told("config.json")
    assert waits == []


def test_a_short_wait_is_obeyed(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    waits = skip_waits(monkeypatch)
    server.fail(FILE, status=429, headers={"Retry_After": "20"}, times=1)
    part = HubRepository("org/draft").part(FILE, ["norm.weight"])
    assert part is not None
    assert sum(waits) >= 20


def test_the_clients_retries_are_lines_of_our_log(
    monkeypatch: pytest.MonkeyPatch,
    server: HubServer,
    tmp_path: Path,
    log: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    skip_waits(monkeypatch)
    endpoint = server.url.replace("//", "//user:pass@w0rd/x@")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert "w0rd" not in hide_secrets(f"GET {endpoint}/org/draft: {endpoint}")
    endpoint = server.url.replace("//", "//user:pass%40w0rd@")
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_ENDPOINT=endpoint)
    basic = base64.b64encode(b"user:pass@w0rd").decode()
    server.users[f"Basic {basic}"] = "member"
    server.fail(FILE, status=503, times=2)
    assert HubRepository("org/draft").part(FILE, ["norm.weight"]) is not None
    warnings = [line for line in log if line.startswith("WARNING")]
    assert len(warnings) == 2
    for number, line in enumerate(warnings, 1):
        assert "HTTP Error 503 thrown while requesting GET " in line
        assert f"Retrying in {number}s [Retry {number}/5]." in line
        assert "\n" not in line
        assert "w0rd" not in line
    captured = capfd.readouterr()
    assert not [it for it in captured.err.splitlines() if "503" in it and " | " not in it]


def test_the_clients_own_log_is_as_before(server: HubServer) -> None:
    handlers = logging.getLogger("huggingface_hub").handlers
    get("config.json")
    with pytest.raises(HubError):
        HubRepository("org/none").file("config.json")
    assert logging.getLogger("huggingface_hub").handlers == handlers
