"""A Hub on loopback, which serves directories as repositories, as the Hugging Face Hub does.

An upload becomes a new commit of its repository, in a directory of its own.

It does only as much as the real client needs, with faults on demand:

    with HubServer() as server:
        server.add_repo("org/draft", directory)
        server.fail("model.safetensors", cut=True, times=1)
        patch_hub(monkeypatch, server, cache)  # or, for a subprocess, hub_environment()
        ...
        assert server.fetched == ["config.json", "model.safetensors", "model.safetensors"]
"""

import base64
import functools
import hashlib
import importlib.util
import json
import math
import re
import shutil
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import pytest
import yaml

from speculators.checkpoint.hub import ranges

__all__ = [
    "MEMBER",
    "STRANGER",
    "HubServer",
    "Request",
    "hub_environment",
    "patch_hub",
    "skip_waits",
]

MEMBER = "hf_memberOfEveryRepository"
"""A token that may read private and gated repositories, and write those of ``org``."""

STRANGER = "hf_strangerToEveryRepository"
"""A valid token without these rights, which may write only the stranger's own repositories."""

# What a new repository's .gitattributes puts into large-file storage.
LFS_SUFFIXES = frozenset({".bin", ".ckpt", ".gguf", ".pt", ".pth", ".safetensors"})


class Request(NamedTuple):
    """A request as it arrived; ``file`` is the file of the repository that it asks for."""

    method: str
    path: str
    file: str | None
    range: str | None
    authorization: str | None


@dataclass
class Repo:
    """A repository: the directory of each commit, and the names that point to commits."""

    private: bool
    gated: bool
    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What to do wrong, and how often, for requests of one method for one file."""

    file: str
    method: str = "GET"
    times: float = math.inf
    status: int | None = None
    """Answer with this status instead."""
    cut: bool = False
    """Close the connection after half of the bytes."""
    delay: float = 0
    """Wait this many seconds before the answer."""
    size: int | None = None
    """Announce this size (HEAD)."""
    etag: str | None = None
    """Announce this ETag (HEAD)."""
    whole: bool = False
    """Answer a request for a range of bytes with the whole file."""
    shift: int = 0
    """Answer a request for a range of bytes with a range that begins so much later."""
    data: bytes | None = None
    """Send these bytes instead."""
    headers: dict[str, str] = field(default_factory=dict)
    """With ``status``, send these headers."""


class HubServer(ThreadingHTTPServer):
    """A Hub on 127.0.0.1, at ``url``, while the context is open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Files in large-file storage come from another origin, as from the Hub's CDN: there
        # the client must not send its token.
        self.cdn_url = f"http://localhost:{self.server_port}/cdn"
        self.repos: dict[str, Repo] = {}
        self.messages: list[str] = []  # the first lines of commit messages
        self.users = {MEMBER: "member", STRANGER: "stranger"}
        self.namespaces = {"member": {"member", "org"}, "stranger": {"stranger"}}
        self._uploads = tempfile.TemporaryDirectory(prefix="hub-")
        self.large_files = Path(self._uploads.name) / "lfs"
        self.large_files.mkdir()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()
        self._uploads.cleanup()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect at any time."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def add_repo(
        self,
        repo_id: str,
        directory: Path,
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Serve a directory as a repository, or as one more revision; return the commit's hash."""
        repo = self.repos.setdefault(repo_id, Repo(private, gated))
        listing = "".join(f"{name} {git_oid(directory / name)}\n" for name in files_of(directory))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        repo.commits[commit] = directory
        repo.refs[revision] = commit
        return commit

    def fail(self, file: str, method: str = "GET", **how: Any) -> None:
        """Add a ``Fault``."""
        self.faults.append(Fault(file, method, **how))

    def take_fault(self, method: str, file: str) -> Fault:
        """The fault to commit now, counted down; if there is none, one without effect."""
        with self._lock:
            for fault in self.faults:
                if (fault.method, fault.file) == (method, file) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault(file)

    def new_commit(self, repo_id: str, revision: str) -> Path:
        """Create a directory for the next commit of a branch, with the branch's current files."""
        repo = self.repos[repo_id]
        directory = Path(tempfile.mkdtemp(dir=self._uploads.name))
        if revision in repo.refs:
            shutil.copytree(repo.commits[repo.refs[revision]], directory, dirs_exist_ok=True)
        return directory

    def content(self, repo_id: str, revision: str = "main") -> Path:
        """The directory that a branch of a repository points to."""
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[revision]]

    @property
    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, in order."""
        return [r.file for r in self.requests if r.method == "GET" and r.file is not None]


class Refusal(Exception):  # noqa: N818 (an answer, not an error)
    """An answer with an error status, the Hub's code for it, and a message."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers["X-Error-Message"] = message
        if code:
            self.headers["X-Error-Code"] = code


class HubHandler(BaseHTTPRequestHandler):
    """Answers one request by the table ``ROUTES`` below."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        # The last route matches everything.
        found, answer = next((m, a) for pattern, a in ROUTES if (m := re.fullmatch(pattern, path)))
        arguments = {name: unquote(text) for name, text in found.groupdict("").items()}
        self.server.requests.append(
            Request(
                self.command,
                self.path,
                arguments.get("file"),
                self.headers.get("Range"),
                self.headers.get("Authorization"),
            )
        )
        try:
            answer(self, **arguments)
        except Refusal as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            self.reply(refusal.status, body, refusal.headers)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Requests are recorded, not printed."""

    def reply(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        size: int | None = None,
    ) -> None:
        """Send an answer, with the bytes unless the request is HEAD."""
        self.send_response(status)
        # One connection a request, so that no thread outlives its test.
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body) if size is None else size))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    # What a request may see

    def user(self) -> str | None:
        """The owner of the token that came with the request."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.server.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return user

    def find_repo(self, repo_id: str) -> Repo:
        user = self.user()
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != "member"):
            if user is None:  # the Hub does not tell anonymous users what exists
                raise Refusal(401, None, "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repo

    def find_commit(self, repo: Repo, revision: str) -> str:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # The routes

    def resolve(self, repo_id: str, revision: str, file: str) -> None:
        repo = self.find_repo(repo_id)
        if repo.gated and (user := self.user()) != "member":
            status = 403 if user else 401
            raise Refusal(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        commit = self.find_commit(repo, revision)
        path = repo.commits[commit] / file
        if file not in files_of(repo.commits[commit]):
            raise Refusal(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        if path.suffix not in LFS_SUFFIXES:
            self.reply_file(path, file, {"X-Repo-Commit": commit, "ETag": f'"{git_oid(path)}"'})
            return
        fault = self.begin_fault(file) if self.command == "HEAD" else Fault(file)
        self.reply(
            302,
            headers={
                "Location": f"{self.server.cdn_url}/{quote(repo_id)}/{commit}/{quote(file)}",
                "X-Repo-Commit": commit,
                "X-Linked-ETag": f'"{fault.etag or sha256(path)}"',
                "X-Linked-Size": str(path.stat().st_size if fault.size is None else fault.size),
            },
        )

    def cdn(self, repo_id: str, revision: str, file: str) -> None:
        path = self.server.repos[repo_id].commits[revision] / file
        self.reply_file(path, file, {"ETag": f'"{sha256(path)}"'})

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        access = {"displayName": "test", "role": "write"}
        self.reply_json({"type": "user", "name": user, "auth": {"accessToken": access}})

    def model_info(self, repo_id: str, revision: str) -> None:
        repo = self.find_repo(repo_id)
        commit = self.find_commit(repo, revision or "main")
        self.reply_json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "tags": [],
                "siblings": [{"rfilename": name} for name in files_of(repo.commits[commit])],
            }
        )

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        repo = self.find_repo(repo_id)
        directory = repo.commits[self.find_commit(repo, revision)]
        entries: list[dict[str, Any]] = []
        for name in files_of(directory):
            path = directory / name
            size = path.stat().st_size
            entry = {"type": "file", "path": name, "size": size, "oid": git_oid(path)}
            if path.suffix in LFS_SUFFIXES:
                entry["lfs"] = {"oid": sha256(path), "size": size, "pointerSize": 134}
            if name.startswith(folder):
                entries.append(entry)
        self.reply_json(entries)

    def nothing(self) -> None:
        raise Refusal(404, None, "Not Found")

    # The routes that write; their faults are those of "create", "preupload", ..., by method

    def writer(self, repo_id: str) -> str:
        """The owner of the token that came, if it may write this repository."""
        user = self.user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if repo_id.partition("/")[0] not in self.server.namespaces[user]:
            raise Refusal(403, None, f"You don't have the rights to write {repo_id}")
        return user

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def create(self) -> None:
        asked = json.loads(self.body())
        self.begin_fault("create")
        namespace = asked["organization"] or self.user()
        repo_id = f"{namespace}/{asked['name']}"
        self.writer(repo_id)
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repos:
            self.reply(409, json.dumps(url | {"error": "You already created this repo"}).encode())
            return
        private = asked.get("visibility") == "private"
        self.server.repos[repo_id] = Repo(private, gated=False)
        directory = self.server.new_commit(repo_id, "main")
        (directory / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs\n")
        self.server.add_repo(repo_id, directory)
        self.reply_json(url)

    def create_branch(self, repo_id: str, revision: str) -> None:
        self.body()
        self.writer(repo_id)
        repo = self.find_repo(repo_id)
        if revision in repo.refs:
            raise Refusal(409, None, "Reference already exists")
        repo.refs[revision] = repo.refs["main"]
        self.reply_json({})

    def validate_yaml(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body())["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(header[1]) if header else None
        except yaml.YAMLError as error:
            answer = {"errors": [{"message": str(error)}], "warnings": []}
            self.reply(400, json.dumps(answer).encode())
            return
        empty = [{"message": "empty or missing yaml metadata in repo card"}]
        self.reply_json({"errors": [], "warnings": [] if metadata else empty})

    def preupload(self, repo_id: str, revision: str) -> None:
        asked = json.loads(self.body())
        self.begin_fault("preupload")
        self.writer(repo_id)
        repo = self.find_repo(repo_id)
        directory = repo.commits[self.find_commit(repo, revision)]
        files = []
        for wanted in asked["files"]:
            path = directory / wanted["path"]
            large = path.suffix in LFS_SUFFIXES
            oid = (sha256 if large else git_oid)(path) if path.is_file() else None
            mode = "lfs" if large else "regular"
            files.append(
                {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.reply_json({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        asked = json.loads(self.body())
        self.begin_fault("batch")
        self.writer(repo_id)
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.server.large_files / wanted["oid"]).is_file():
                answer["actions"] = {
                    "upload": {"href": f"{self.server.cdn_url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.url}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(answer)
        self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        data = self.body()
        self.begin_fault("lfs")
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, None, "the object is not the one that was announced")
        (self.server.large_files / oid).write_bytes(data)
        self.reply(200)

    def lfs_verify(self, repo_id: str) -> None:
        asked = json.loads(self.body())
        self.writer(repo_id)
        if (self.server.large_files / asked["oid"]).stat().st_size != asked["size"]:
            raise Refusal(400, None, "the object has another size")
        self.reply_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        self.begin_fault("commit")
        self.writer(repo_id)
        parent = lines[0]["value"].get("parentCommit")
        if parent not in {None, self.server.repos[repo_id].refs.get(revision)}:
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        self.server.messages.append(lines[0]["value"]["summary"])
        pull_request = "create_pr=1" in urlsplit(self.path).query
        directory = self.server.new_commit(repo_id, revision)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (directory / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                shutil.copy(self.server.large_files / value["oid"], directory / value["path"])
            elif line["key"] == "deletedFile":
                (directory / value["path"]).unlink()
        target = "refs/pr/1" if pull_request else revision
        commit = self.server.add_repo(repo_id, directory, revision=target)
        self.reply_json(
            {
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}",
                "pullRequestUrl": f"{self.server.url}/{repo_id}/discussions/1",
            }
        )

    # Files, and what may be wrong with them

    def begin_fault(self, file: str) -> Fault:
        """Return the fault of this request; a delay or a status is committed here already."""
        fault = self.server.take_fault(self.command, file)
        if fault.delay:
            self.server.closing.wait(fault.delay)
        if fault.status:
            phrase = HTTPStatus(fault.status).phrase
            raise Refusal(fault.status, None, phrase, **fault.headers)
        return fault

    def reply_file(self, path: Path, file: str, headers: dict[str, str]) -> None:
        fault = self.begin_fault(file)
        total = path.stat().st_size if fault.data is None else len(fault.data)
        first, last = 0, total - 1
        headers["Accept-Ranges"] = "bytes"
        if fault.etag:
            headers["ETag"] = f'"{fault.etag}"'
        status = 200
        asked = "" if fault.whole else self.headers.get("Range", "")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            first, last = int(match[1]), min(int(match[2] or total), total - 1)
            first, last = first + fault.shift, last + fault.shift
            if first > last:
                self.reply(416, headers=headers | {"Content-Range": f"bytes */{total}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if fault.data is None:
            with path.open("rb") as stored:
                stored.seek(first)
                body = stored.read(last + 1 - first)
        else:
            body = fault.data[first : last + 1]
        size = len(body) if fault.size is None else fault.size
        self.reply(status, body[: len(body) // 2] if fault.cut else body, headers, size)


def files_of(directory: Path) -> list[str]:
    """The names of all files below a directory, with ``/`` between folders."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def git_oid(path: Path) -> str:
    """The hash that git gives a file."""
    return _hash("sha1", path, path.stat().st_size, path.stat().st_mtime_ns)


def sha256(path: Path) -> str:
    return _hash("sha256", path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.cache
def _hash(algorithm: str, path: Path, size: int, changed: int) -> str:
    """The hash of a file as it is now: a real verifier's is asked for many times."""
    digest = hashlib.new(algorithm, b"blob %d\0" % size if algorithm == "sha1" else b"")
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


_REPO = "(?P<repo_id>[^/]+(?:/[^/]+)?)"
_FILE = _REPO + "/%s(?P<revision>[^/]+)/(?P<file>.+)"

# The first that matches the whole path answers; its groups are the arguments.
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("/api/whoami-v2", HubHandler.whoami),
    ("/api/repos/create", HubHandler.create),
    ("/api/validate-yaml", HubHandler.validate_yaml),
    (f"/api/models/{_REPO}/branch/(?P<revision>[^/]+)", HubHandler.create_branch),
    (f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", HubHandler.preupload),
    (f"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", HubHandler.commit),
    (f"/{_REPO}[.]git/info/lfs/objects/batch", HubHandler.lfs_batch),
    (f"/{_REPO}[.]git/info/lfs/verify", HubHandler.lfs_verify),
    ("/cdn/lfs/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_put),
    (f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", HubHandler.tree),
    (f"/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?", HubHandler.model_info),
    ("/cdn/" + _FILE % "", HubHandler.cdn),
    ("/" + _FILE % "resolve/", HubHandler.resolve),
    (".*", HubHandler.nothing),
]


def hub_environment(server: HubServer, cache: Path, **changes: str) -> dict[str, str]:
    """Environment variables that send the Hub's client to ``server``, on top of ``os.environ``.

    Every variable that could lead elsewhere is set, if need be to an empty value, so the machine's
    own token, proxy or cache has no effect. ``changes``, such as ``HF_TOKEN=MEMBER``, come last.
    """
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_XET_CACHE": str(cache / "xet"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_TOKEN": "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HUGGINGFACE_CO_STAGING": "",
        "HF_OIDC_RESOURCE": "",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "",
        "TRANSFORMERS_OFFLINE": "",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **changes,
    }


_shared_context = functools.cache(ssl.create_default_context)


def patch_hub(
    monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path, **changes: str
) -> None:
    """Send the Hub's client of this process to ``server``, until ``monkeypatch`` is undone.

    The client reads its environment on import, which has often happened already. So its module of
    constants is executed once more, as a separate module under the new environment, and the
    constants that differ are copied into the old one, where the other modules look them up.
    """
    from huggingface_hub import close_session, constants, hf_api

    for name, value in hub_environment(server, cache, **changes).items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location(constants.__name__, constants.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    for name, value in vars(fresh).items():
        if name.isupper() and value != getattr(constants, name):
            monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # read on import, too
    if (of_transformers := sys.modules.get("transformers.utils.hub")) is not None:
        # It keeps a client with the endpoint of its first use, perhaps that of an earlier test.
        monkeypatch.setattr(of_transformers, "_hf_api", None, raising=False)
    # Each new client reads all certificates, which nothing here needs.
    monkeypatch.setattr(ssl, "create_default_context", _shared_context)
    close_session()  # drop earlier connections and proxies


def skip_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the client retry without waiting; return the seconds that it would have waited."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    waits: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": waits.append})
    for module in (file_download, _http, ranges):
        monkeypatch.setattr(module, "time", clock)
    return waits
