"""The real client against a Hub on loopback: what is fetched, and every way to fail."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from hub_server import MEMBER, STRANGER, HubServer, hub_environment, patch_hub, skip_waits
from speculators.checkpoint.hub import repository as hub
from speculators.checkpoint.hub.access import HubAccess
from speculators.checkpoint.hub.repository import HubRepository
from speculators.checkpoint.repository import Repository
from speculators.errors import HubError

WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A directory with the files of an EAGLE repository, and others."""
    directory = tmp_path / "draft"
    (directory / "original").mkdir(parents=True)
    (directory / "config.json").write_text('{"num_hidden_layers": 1}')
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    (directory / "pytorch_model.bin").write_bytes(WEIGHTS[::-1])
    (directory / "original" / "params.json").write_text("{}")
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch, server: HubServer, draft: Path, cache: Path) -> None:
    patch_hub(monkeypatch, server, cache)
    server.add_repo("org/draft", draft)


def sentence(repository: HubRepository, filename: str = "config.json") -> str:
    """The message of the error that asking for a file raises, which must be one sentence."""
    with pytest.raises(HubError) as caught:
        repository.file(filename)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert text.endswith(".")
    assert text[0] == text[0].upper() or text.startswith((repository.name, "http", "no-url"))
    assert MEMBER not in text
    assert STRANGER not in text
    return text


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# What is fetched


def test_only_the_files_asked_for_are_fetched(server: HubServer, draft: Path) -> None:
    repository: Repository = HubRepository("org/draft")
    assert repository.name == "org/draft"
    assert not server.requests
    for name in ("config.json", "model.safetensors"):
        path = repository.file(name)
        assert path is not None
        assert path.name == name
        assert path.read_bytes() == (draft / name).read_bytes()
    assert server.fetched == ["config.json", "model.safetensors"]
    assert {request.method for request in server.requests} == {"HEAD", "GET"}
    assert not [request for request in server.requests if request.path.startswith("/api")]


def test_a_file_that_the_repository_lacks_is_none(server: HubServer) -> None:
    repository = HubRepository("org/draft")
    assert repository.file("model.safetensors.index.json") is None
    assert repository.commit is None
    assert repository.file("config.json") is not None
    assert repository.file("model.safetensors.index.json") is None
    assert server.fetched == ["config.json"]


def test_asking_whether_a_file_is_there_downloads_nothing(server: HubServer, draft: Path) -> None:
    commit = server.add_repo("org/draft", draft)
    repository = HubRepository("org/draft")
    assert not repository.holds("model.safetensors.index.json")
    assert repository.holds("model.safetensors")
    assert repository.commit == commit
    assert not server.fetched
    assert repository.file("model.safetensors") is not None
    server.requests.clear()
    assert repository.holds("model.safetensors")
    assert not server.requests
    with pytest.raises(HubError, match="no public repository"):
        HubRepository("org/drafft").holds("config.json")


def test_a_file_in_a_folder(server: HubServer, draft: Path) -> None:
    commit = server.add_repo("org/draft", draft)
    repository = HubRepository("org/draft")
    path = repository.file("original/params.json")
    assert path is not None
    assert path.parts[-3:] == (commit, "original", "params.json")
    assert repository.commit == commit


def test_the_second_time_comes_from_the_cache(server: HubServer) -> None:
    first = HubRepository("org/draft").file("model.safetensors")
    server.requests.clear()
    assert HubRepository("org/draft").file("model.safetensors") == first
    assert [request.method for request in server.requests] == ["HEAD"]


def test_the_cache_is_where_it_was_asked_for(cache: Path, tmp_path: Path) -> None:
    path = HubRepository("org/draft", HubAccess(tmp_path / "other")).file("config.json")
    assert path is not None
    assert path.is_relative_to(tmp_path / "other")
    assert not cache.exists()


def test_a_revision_is_a_branch_or_a_commit(server: HubServer, draft: Path, tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.json").write_text('{"older": true}')
    main = server.add_repo("org/draft", draft)
    older = server.add_repo("org/draft", tmp_path / "older", revision="refs/pr/1")
    assert main != older
    for revision, commit in {None: main, "main": main, "refs/pr/1": older, older: older}.items():
        repository = HubRepository("org/draft", revision=revision)
        path = repository.file("config.json")
        assert path is not None
        assert repository.commit == commit
        assert ("older" in path.read_text()) == (commit == older)
    server.requests.clear()
    assert HubRepository("org/draft", revision=older).file("config.json") is not None
    assert not server.requests  # a commit that is cached cannot have changed


def test_all_files_come_from_one_commit(server: HubServer, draft: Path, tmp_path: Path) -> None:
    before = server.add_repo("org/draft", draft)
    repository = HubRepository("org/draft")
    repository.file("config.json")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text('{"newer": true}')
    (newer / "model.safetensors").write_bytes(WEIGHTS)
    after = server.add_repo("org/draft", newer)

    old = repository.file("model.safetensors")
    assert repository.commit == before
    repository = HubRepository("org/draft")
    new = repository.file("model.safetensors")
    assert repository.commit == after
    assert old is not None
    assert new is not None
    assert old.parent.name == before
    assert old.samefile(new)
    assert server.fetched == ["config.json", "model.safetensors"]  # the weights only once


def test_a_cache_without_links(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path
) -> None:
    patch_hub(monkeypatch, server, cache, HF_HUB_DISABLE_SYMLINKS="1")
    path = HubRepository("org/draft").file("model.safetensors")
    assert path is not None
    assert not path.is_symlink()
    assert path.read_bytes() == WEIGHTS


def test_the_client_is_imported_only_when_a_file_is_asked_for() -> None:
    code = (
        "import sys, speculators.checkpoint.hub.repository as hub; hub.HubRepository('org/draft');"
        "print({'huggingface_hub', 'httpx', 'httpx2', 'tqdm', 'torch'} & set(sys.modules))"
    )
    done = run_python(code, {})
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_in_a_process_of_its_own(server: HubServer, draft: Path, cache: Path) -> None:
    """The client itself reads the environment variables, and stderr stays empty."""
    server.add_repo("org/private", draft, private=True)
    code = (
        "from speculators.checkpoint.hub.repository import HubRepository\n"
        "repository = HubRepository('org/private')\n"
        "print(repository.file('config.json').read_text())\n"
        "print(repository.file('model.safetensors').stat().st_size, repository.file('none.json'))"
    )
    expected = (0, f'{{"num_hidden_layers": 1}}\n{len(WEIGHTS)} None\n', "")
    done = run_python(code, hub_environment(server, cache, HF_TOKEN=MEMBER))
    assert (done.returncode, done.stdout, done.stderr) == expected
    server.requests.clear()
    done = run_python(code, hub_environment(server, cache, HF_HUB_OFFLINE="1"))
    assert (done.returncode, done.stdout, done.stderr) == expected
    assert not server.requests


# Who may read


def test_a_private_repository(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, draft: Path, cache: Path
) -> None:
    server.add_repo("org/private", draft, private=True)
    repository = HubRepository("org/private")
    assert "no public repository 'org/private'" in sentence(repository)
    assert "HF_TOKEN" in sentence(repository)
    patch_hub(monkeypatch, server, cache, HF_TOKEN=STRANGER)
    assert "no repository 'org/private'" in sentence(repository)
    assert "that the access token may read" in sentence(repository)
    patch_hub(monkeypatch, server, cache, HF_TOKEN=MEMBER)
    assert repository.file("config.json") is not None


def test_a_gated_repository(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, draft: Path, cache: Path
) -> None:
    server.add_repo("org/gated", draft, gated=True)
    repository = HubRepository("org/gated")
    assert "gated and no access token was sent" in sentence(repository)
    assert f"accept its licence at {server.url}/org/gated" in sentence(repository)
    patch_hub(monkeypatch, server, cache, HF_TOKEN=STRANGER)
    assert "gated and the access token has no access to it" in sentence(repository)
    assert f"accept its licence at {server.url}/org/gated" in sentence(repository)
    patch_hub(monkeypatch, server, cache, HF_TOKEN=MEMBER)
    assert repository.file("config.json") is not None


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("hf_thatNobodyHas", "rejects the access token: set HF_TOKEN to a valid one"),
        ("hf_thatNobodyTypès", "The access token holds characters that cannot be sent"),
    ],
)
def test_a_token_that_is_none(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path, token: str, expected: str
) -> None:
    patch_hub(monkeypatch, server, cache, HF_TOKEN=token)
    text = sentence(HubRepository("org/draft"))
    assert expected in text
    assert token not in text


def test_the_token_goes_to_the_hub_alone_and_into_no_log(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    server: HubServer,
    draft: Path,
    cache: Path,
) -> None:
    server.add_repo("org/gated", draft, gated=True)
    # The client sets its own level, and under HF_DEBUG logs requests with their headers.
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "huggingface_hub"):
        for token in (STRANGER, MEMBER):
            patch_hub(monkeypatch, server, cache, HF_TOKEN=token, HF_DEBUG="1")
            repository = HubRepository("org/gated")
            if token == STRANGER:
                sentence(repository)
            else:
                assert repository.file("model.safetensors") is not None
    for request in server.requests:  # weights come from the CDN, whose links are signed
        assert (request.authorization is None) == request.path.startswith("/cdn")
    captured = capfd.readouterr()
    assert "<TOKEN>" in caplog.text
    for text in (caplog.text, captured.out, captured.err):
        assert MEMBER not in text
        assert STRANGER not in text


def test_a_token_in_an_error_of_the_client_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(**_: object) -> NoReturn:
        raise RuntimeError(f"Illegal header value b'Bearer {MEMBER}'\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(HubError, match=r"RuntimeError: Illegal header value b'Bearer \*\*\*'") as e:
        HubRepository("org/draft").file("config.json")
    assert e.value.__cause__ is None
    assert e.value.__suppress_context__


# What is not there


def test_no_such_repository(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path
) -> None:
    text = sentence(HubRepository("org/drafft"))
    assert f"no public repository 'org/drafft' on {server.url}: check the spelling" in text
    patch_hub(monkeypatch, server, cache, HF_TOKEN=MEMBER)
    text = sentence(HubRepository("org/drafft"))
    assert "no repository 'org/drafft'" in text
    assert "(or the path, if a directory on this machine was meant)" in text


@pytest.mark.parametrize("revision", ["v9", "feature/x", "0" * 40])
def test_no_such_revision(revision: str) -> None:
    text = sentence(HubRepository("org/draft", revision=revision))
    assert f"has no revision '{revision}'" in text


@pytest.mark.parametrize(
    "repo_id",
    [
        *("", ".", "../draft", "/no/such/draft", "a/b/c", "org/", "two words", "a--b", "a..b"),
        *("draft.git", "C:\\draft", "draft?", "two\nlines", "https://example.org/org/draft"),
    ],
)
def test_ids_that_are_none(server: HubServer, repo_id: str) -> None:
    text = sentence(HubRepository(repo_id))
    assert text.startswith(f"{repo_id!r} is neither an existing directory or file nor a Hub id")
    assert not server.requests


def test_a_name_that_leads_out_of_the_repository(server: HubServer) -> None:
    """A damaged or malicious index of shards may contain such a name."""
    assert "../../config.json" in sentence(HubRepository("org/draft"), "../../config.json")
    assert not server.requests


# The network


def test_a_cut_download_is_resumed(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    waits = skip_waits(monkeypatch)
    # The client keeps whole chunks only: of 10 MiB, unless told otherwise.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    server.fail("model.safetensors", cut=True, times=2)
    path = HubRepository("org/draft").file("model.safetensors")
    assert path is not None
    assert path.read_bytes() == WEIGHTS
    half, quarter = len(WEIGHTS) // 2, len(WEIGHTS) // 4
    ranges = [request.range for request in server.requests if request.method == "GET"]
    assert ranges == [None, f"bytes={half}-", f"bytes={half + quarter}-"]
    assert waits == [1, 1]


def test_a_download_that_is_always_cut(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path
) -> None:
    waits = skip_waits(monkeypatch)
    server.fail("model.safetensors", cut=True)
    text = sentence(HubRepository("org/draft"), "model.safetensors")
    assert f"cannot be fetched from {server.url} (peer closed connection" in text
    assert sum(waits) < 30
    assert not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_server_in_trouble_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, draft: Path, filename: str, method: str
) -> None:
    waits = skip_waits(monkeypatch)
    server.fail(filename, method, status=503, times=3)
    path = HubRepository("org/draft").file(filename)
    assert path is not None
    assert path.read_bytes() == (draft / filename).read_bytes()
    assert 0 < sum(waits) < 30


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (500, "(500 Internal Server Error): try again later"),
        (503, "(503 Service Unavailable): try again later"),
        (403, "forbids reading 'config.json' of org/draft (403 Forbidden)"),
        (404, "does not serve 'config.json' of org/draft (404 Not Found)"),
        (429, "too many requests from here (429 Too Many Requests): wait some minutes"),
    ],
)
def test_a_server_that_refuses_for_good(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, method: str, status: int, expected: str
) -> None:
    waits = skip_waits(monkeypatch)
    server.fail("config.json", method, status=status)
    assert expected in sentence(HubRepository("org/draft"))
    assert sum(waits) < 30


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_server_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, method: str
) -> None:
    waits = skip_waits(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.05, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    server.fail("config.json", method, delay=60)
    text = sentence(HubRepository("org/draft"))
    assert f"'config.json' of org/draft cannot be fetched from {server.url} (timed out)" in text
    assert sum(waits) < 30


def test_no_server(monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path) -> None:
    waits = skip_waits(monkeypatch)
    with HubServer() as gone:
        pass
    patch_hub(monkeypatch, gone, cache)
    text = sentence(HubRepository("org/draft"))
    assert f"cannot be fetched from {gone.url} (Connection refused): check the network" in text
    assert "HF_HUB_OFFLINE=1" in text
    assert sum(waits) < 30
    patch_hub(monkeypatch, server, cache)
    assert HubRepository("org/draft").file("config.json") is not None
    patch_hub(monkeypatch, gone, cache)
    assert HubRepository("org/draft").file("config.json") is not None  # cached meanwhile


def test_a_server_that_is_not_a_hub(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path
) -> None:
    patch_hub(monkeypatch, server, cache, HF_ENDPOINT="no-url")
    assert "cannot be fetched from no-url (Request URL is missing" in sentence(HubRepository("o/d"))
    server.fail("config.json", "HEAD", status=204)
    patch_hub(monkeypatch, server, cache)
    text = sentence(HubRepository("org/draft"))
    assert f"{server.url} does not answer as a Hub does" in text
    assert "check HF_ENDPOINT" in text


# Bytes that are not those announced


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
def test_a_wrong_size(server: HubServer, draft: Path, cache: Path, filename: str) -> None:
    size = (draft / filename).stat().st_size
    server.fail(filename, "HEAD", size=size + 5, times=1)
    text = sentence(HubRepository("org/draft"), filename)
    assert f"did not arrive whole ({size + 5} bytes were announced and {size} came)" in text
    path = HubRepository("org/draft").file(filename)
    assert path is not None
    assert path.read_bytes() == (draft / filename).read_bytes()


def test_a_wrong_hash(server: HubServer, cache: Path) -> None:
    server.fail("model.safetensors", "HEAD", etag="0" * 64, times=1)
    repository = HubRepository("org/draft")
    text = sentence(repository, "model.safetensors")
    assert "its SHA-256 is not the one" in text
    assert repository.commit is None
    assert not [path for path in cache.rglob("*") if path.name == "0" * 64]
    path = repository.file("model.safetensors")
    assert path is not None
    assert path.read_bytes() == WEIGHTS


def test_an_etag_that_is_no_hash(server: HubServer) -> None:
    """A mirror may send any ETag."""
    server.fail("model.safetensors", "HEAD", etag="5f-1a2b", times=1)
    assert HubRepository("org/draft").file("model.safetensors") is not None


# Offline


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path, variable: str
) -> None:
    path = HubRepository("org/draft").file("config.json")
    server.requests.clear()
    patch_hub(monkeypatch, server, cache, **{variable: "1"})
    repository = HubRepository("org/draft")
    assert repository.file("model.safetensors") is None  # also before any file was found
    assert repository.file("config.json") == path
    assert repository.file("model.safetensors") is None
    assert repository.holds("config.json")
    assert not repository.holds("model.safetensors")
    for other in (HubRepository("org/other"), HubRepository("org/draft", revision="v2")):
        text = sentence(other)
        assert f"not in the cache {cache / 'hub'} and offline mode forbids" in text
        assert "unset HF_HUB_OFFLINE" in text
    assert not server.requests


def test_offline_after_a_failed_download(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path
) -> None:
    skip_waits(monkeypatch)
    server.fail("config.json", status=500)
    sentence(HubRepository("org/draft"))
    patch_hub(monkeypatch, server, cache, HF_HUB_OFFLINE="1")
    assert "not in the cache" in sentence(HubRepository("org/draft"))


# The disk


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, "No space is left for 'config.json' of org/draft in the cache {cache}"),
        (errno.EDQUOT, "No space is left for 'config.json' of org/draft in the cache {cache}"),
        (errno.EROFS, "in the cache {cache} (Read-only file system: model): make it writable"),
        (errno.EIO, "in the cache {cache} (Input/output error: model)"),
    ],
)
def test_a_disk_that_does_not_take_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, expected: str
) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code), "model")

    monkeypatch.setattr(file_download, "http_get", fails)
    text = sentence(HubRepository("org/draft", HubAccess(tmp_path / "disk")))
    assert expected.format(cache=tmp_path / "disk") in text
    assert "--cache-dir or HF_HOME" in text


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = sentence(HubRepository("org/draft", HubAccess(tmp_path / "file")))
    assert f"cannot be kept in the cache {tmp_path / 'file'} (Not a directory" in text


def test_a_read_only_cache(server: HubServer, cache: Path) -> None:
    path = HubRepository("org/draft").file("config.json")
    folders = [p for p in [cache, *cache.rglob("*")] if p.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        if os.access(cache, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert HubRepository("org/draft").file("config.json") == path
        text = sentence(HubRepository("org/draft"), "model.safetensors")
        assert f"cannot be kept in the cache {cache / 'hub'} (Permission denied" in text
    finally:
        for folder in folders:
            folder.chmod(0o700)


# The table, and the server itself


@pytest.mark.parametrize("kind", hub._SENTENCES)
def test_every_sentence_can_be_formatted(kind: str) -> None:
    fields = {field for _, field, _, _ in Formatter().parse(hub._SENTENCES[kind]) if field}
    assert fields <= {"repo", "revision", "file", "endpoint", "cache", "kind", "reason"}


def test_credentials_in_an_endpoint_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path
) -> None:
    endpoint = server.url.replace("//", "//user:password@")
    patch_hub(monkeypatch, server, cache, HF_ENDPOINT=endpoint)
    text = sentence(HubRepository("org/draft", revision="v9"))
    assert server.url.replace("//", "//***@") in text


def test_the_rest_of_the_client_finds_a_hub(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, draft: Path, cache: Path
) -> None:
    patch_hub(monkeypatch, server, cache, HF_TOKEN=MEMBER)
    names = ["config.json", "model.safetensors", "original/params.json", "pytorch_model.bin"]
    info = huggingface_hub.model_info("org/draft")
    assert info.sha == server.add_repo("org/draft", draft)
    assert [sibling.rfilename for sibling in info.siblings or []] == names
    assert huggingface_hub.list_repo_files("org/draft") == names
    user: dict[str, Any] = huggingface_hub.whoami()
    assert user["name"] == "member"
    assert all(request.file is None for request in server.requests)
