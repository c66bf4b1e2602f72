"""Uploading with the real client to a Hub on loopback: what arrives, and every way to fail."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import huggingface_hub
import pytest

from helpers import PLAIN
from hub_server import MEMBER, STRANGER, HubServer, files_of, patch_hub, skip_waits
from speculators.checkpoint.hub import upload as upload_module
from speculators.checkpoint.hub.upload import check_upload, upload
from speculators.checkpoint.output.stamp import is_stamped, write_stamped
from speculators.errors import HubError

CARD = "---\ntags: [eagle]\n---\n# A draft\n"
FILES = ["README.md", "config.json", "conversion.json", "model.safetensors"]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch, server: HubServer, tmp_path: Path) -> None:
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN=MEMBER)


@pytest.fixture
def draft(tmp_path: Path, converted: dict[str, Path]) -> Path:
    directory = tmp_path / "draft"
    shutil.copytree(converted[PLAIN], directory)
    write_stamped(directory / "README.md", CARD)
    return directory


def writes(server: HubServer) -> list[str]:
    return [request.path for request in server.requests if request.method in {"POST", "PUT"}]


def sentence(draft: Path, repo_id: str = "org/draft", **options: Any) -> str:
    with pytest.raises(HubError) as caught:
        upload(draft, repo_id, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert MEMBER not in text
    assert STRANGER not in text
    return text


# What arrives


def test_a_new_repository_gets_all_files_in_one_commit(server: HubServer, draft: Path) -> None:
    (draft / "notes.txt").write_text("a user's own")
    (draft / "cache").mkdir()
    url = upload(draft, "org/draft")
    there = server.content("org/draft")
    assert files_of(there) == [".gitattributes", *FILES]
    for name in FILES:
        assert (there / name).read_bytes() == (draft / name).read_bytes()
    repo = server.repos["org/draft"]
    assert url == f"{server.url}/org/draft/commit/{repo.refs['main']}"
    assert len(repo.commits) == 2
    assert not repo.private
    assert len([path for path in writes(server) if "/lfs/" in path]) == 3  # batch, PUT, verify


def test_a_second_upload_sends_nothing(server: HubServer, draft: Path, log: list[str]) -> None:
    first = upload(draft, "org/draft")
    server.requests.clear()
    assert upload(draft, "org/draft") == first
    assert not [path for path in writes(server) if "/cdn/" in path or "/commit/" in path]
    assert log[-1] == "INFO org/draft has all of it already"


def test_only_what_changed_is_sent(server: HubServer, draft: Path) -> None:
    upload(draft, "org/draft")
    (draft / "conversion.json").unlink()
    (draft / "config.json").write_text((draft / "config.json").read_text() + "\n")
    upload(draft, "org/draft")
    there = server.content("org/draft")
    assert files_of(there) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert (there / "config.json").read_text() == (draft / "config.json").read_text()
    assert len([path for path in writes(server) if path.startswith("/cdn/lfs/")]) == 1


def test_files_of_an_earlier_draft_go_and_others_stay(
    server: HubServer, draft: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(draft, earlier)
    shutil.copy(draft / "model.safetensors", earlier / "model-00001-of-00001.safetensors")
    (earlier / "model.safetensors.index.json").write_text("{}")
    (earlier / "picture.png").write_bytes(b"png")
    server.add_repo("org/draft", earlier)
    upload(draft, "org/draft")
    assert files_of(server.content("org/draft")) == [*FILES, "picture.png"]


def test_private(server: HubServer, draft: Path) -> None:
    upload(draft, "org/draft", private=True)
    assert server.repos["org/draft"].private
    upload(draft, "org/draft", private=True)


def test_what_is_public_is_not_taken_for_private(server: HubServer, draft: Path) -> None:
    server.add_repo("org/draft", draft)
    server.requests.clear()
    text = sentence(draft, private=True)
    assert text.startswith("org/draft exists and is public, so nothing was uploaded:")
    assert writes(server) == ["/api/repos/create"]


def test_a_name_alone_is_the_users_own(server: HubServer, draft: Path) -> None:
    assert upload(draft, "draft").startswith(f"{server.url}/member/draft/commit/")


def test_a_branch_and_a_pull_request(server: HubServer, draft: Path) -> None:
    upload(draft, "org/draft", revision="dev", message="Try it", description="once")
    repo = server.repos["org/draft"]
    assert files_of(repo.commits[repo.refs["main"]]) == [".gitattributes"]
    assert files_of(repo.commits[repo.refs["dev"]]) == [".gitattributes", *FILES]
    url = upload(draft, "org/draft", create_pr=True)
    assert url == f"{server.url}/org/draft/discussions/1"
    assert files_of(repo.commits[repo.refs["main"]]) == [".gitattributes"]


def test_the_rest_of_the_client_reads_it(server: HubServer, draft: Path) -> None:
    upload(draft, "org/draft")
    info = huggingface_hub.model_info("org/draft")
    assert [file.rfilename for file in info.siblings or []] == [".gitattributes", *FILES]


# What is there already


@pytest.mark.parametrize("stamped", [True, False])
def test_a_card_that_somebody_wrote_is_kept(
    server: HubServer, draft: Path, tmp_path: Path, log: list[str], stamped: bool
) -> None:
    """The Hub's card is kept; the directory's is uploaded if somebody wrote that one."""
    edited = tmp_path / "edited"
    shutil.copytree(draft, edited)
    (edited / "README.md").write_text((draft / "README.md").read_text() + "and more\n")
    server.add_repo("org/draft", edited)
    if not stamped:
        (draft / "README.md").write_text(CARD + "# By hand\n")
    upload(draft, "org/draft")
    kept = edited if stamped else draft
    there = server.content("org/draft") / "README.md"
    assert there.read_text() == (kept / "README.md").read_text()
    assert ("INFO The README.md of org/draft was edited there, and is kept" in log) == stamped


def test_a_card_of_ours_is_replaced(server: HubServer, draft: Path) -> None:
    upload(draft, "org/draft")
    write_stamped(draft / "README.md", CARD + "# Better\n")
    upload(draft, "org/draft")
    assert (server.content("org/draft") / "README.md").read_text().startswith(CARD + "# Better\n")


def test_another_model_is_left_alone(server: HubServer, draft: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    server.add_repo("org/draft", other)
    assert sentence(draft) == (
        "org/draft holds a model that is not a converted draft, so nothing was uploaded: choose "
        "another repository."
    )
    assert server.content("org/draft") == other


def test_a_change_by_somebody_else_meanwhile(
    server: HubServer, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(draft, "org/draft")
    write_stamped(draft / "README.md", CARD + "# Better\n")
    preupload = huggingface_hub.HfApi.preupload_lfs_files

    def change(*arguments: Any, **options: Any) -> None:
        preupload(*arguments, **options)
        directory = server.new_commit("org/draft", "main")
        (directory / "other.txt").touch()
        server.add_repo("org/draft", directory)

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", change)
    assert sentence(draft) == (
        "org/draft was changed by somebody else while it was uploaded to: try again."
    )


# Failing


def test_no_token(
    server: HubServer, draft: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    patch_hub(monkeypatch, server, tmp_path / "cache")
    text = sentence(draft)
    assert text.startswith("Uploading to org/draft needs an access token: log in with")
    with pytest.raises(HubError, match="needs an access token"):
        check_upload("org/draft")
    check_upload("org/draft", token=MEMBER)
    assert not server.requests
    upload(draft, "org/draft", token=MEMBER)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"HF_TOKEN": "hf_unknownToEverybody"}, "{url} rejects the access token: set HF_TOKEN to"),
        ({"HF_TOKEN": STRANGER}, "{url} does not let the access token write org/draft (403 "),
        ({"HF_HUB_OFFLINE": "1"}, "Offline mode forbids uploading to org/draft: unset"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "org/draft cannot be uploaded to http://127.0"),
        ({"HF_TOKEN": "hf_" + "\xe9" * 8}, "The access token holds characters that cannot be"),
    ],
)  # fmt: skip
def test_what_the_environment_makes_fail(
    monkeypatch: pytest.MonkeyPatch,
    server: HubServer,
    draft: Path,
    tmp_path: Path,
    changes: dict[str, str],
    expected: str,
) -> None:
    skip_waits(monkeypatch)
    patch_hub(monkeypatch, server, tmp_path / "cache", **{"HF_TOKEN": MEMBER, **changes})
    assert sentence(draft).startswith(expected.format(url=server.url))
    assert not server.repos


@pytest.mark.parametrize(
    ("where", "method", "status", "expected"),
    [
        ("create", "POST", 500, "{url} fails to take the files for org/draft (500 Internal"),
        ("preupload", "POST", 429, "{url} has had too many requests from here (429 Too Many"),
        ("batch", "POST", 413, "{url} does not take the files for org/draft (413 "),
        ("lfs", "PUT", 500, "{url} fails to take the files for org/draft (500 Internal"),
        ("commit", "POST", 403, "{url} does not let the access token write org/draft (403 "),
        ("commit", "POST", 503, "{url} fails to take the files for org/draft (503 Service"),
    ],
)
def test_what_the_hub_makes_fail(
    monkeypatch: pytest.MonkeyPatch,
    server: HubServer,
    draft: Path,
    where: str,
    method: str,
    status: int,
    expected: str,
) -> None:
    """Whichever step fails, the repository holds nothing of the upload."""
    skip_waits(monkeypatch)
    server.fail(where, method, status=status)
    assert sentence(draft).startswith(expected.format(url=server.url))
    if server.repos:
        assert files_of(server.content("org/draft")) == [".gitattributes"]


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "org/dra ft", "org/.draft", "./draft"])
def test_what_is_no_id(server: HubServer, draft: Path, repo_id: str) -> None:
    assert "is not a Hub id, so nothing can be uploaded there" in sentence(draft, repo_id)
    assert not server.requests


@pytest.mark.parametrize("kind", upload_module._SENTENCES)
def test_every_sentence_can_be_formatted(kind: str) -> None:
    parsed = Formatter().parse(upload_module._SENTENCES[kind])
    assert {field for _, field, _, _ in parsed if field} <= {"repo", "endpoint", "kind", "reason"}


# The stamp


def test_a_stamp_is_of_what_is_above_it(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    assert write_stamped(file, "one\n")
    text = file.read_text()
    assert text.startswith("one\n<!-- ")
    assert is_stamped(text)
    for edited in ("", "two\n", "One" + text[3:], text + "two\n", text + "\n", text[:-1], text * 2):
        assert not is_stamped(edited)


def test_what_is_edited_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    assert write_stamped(file, "one\n")
    assert write_stamped(file, "two\n")
    file.write_text(file.read_text().replace("two", "three"))
    before = file.read_text()
    assert not write_stamped(file, "four\n")
    assert file.read_text() == before
    file.write_bytes(b"\xff\xfe")
    assert not write_stamped(file, "five\n")
