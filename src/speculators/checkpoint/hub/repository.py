"""A repository on the Hugging Face Hub, read one file at a time.

The Hub's own client does the work, with its cache, its retries and its environment
(``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ...). Added here: all files of a
repository come from one commit, files are checked once against the hash that the Hub announced,
whoever put them into the cache, single tensors can be fetched from a safetensors file, and every
failure is reported in one sentence.

The client is imported only when a file is requested, since importing it is slow.
"""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from loguru import logger

from speculators.checkpoint.files.safetensors_file import (
    PREFIX_BYTES,
    find_data,
    parse_header,
    read_safetensors_file,
)
from speculators.checkpoint.hub.access import DEFAULT_ACCESS, HubAccess
from speculators.checkpoint.hub.cache import check_place, delete_cached, find_damage
from speculators.checkpoint.hub.client import watched_client
from speculators.checkpoint.hub.errors import kinds_of, raise_hub_error
from speculators.checkpoint.hub.ranges import read_range, retried, write_part
from speculators.checkpoint.paths import local_path
from speculators.errors import CheckpointError

__all__ = ["HubRepository"]

_NO_REPOSITORY = (
    "There is no public repository '{repo}' on {endpoint}: check the spelling (or the path, if a"
    " directory on this machine was meant), or set HF_TOKEN if the repository is private"
)
_NO_SPACE = (
    "No space is left for '{file}' of {repo} in the cache {cache}: free some, or choose another"
    " cache with --cache-dir or HF_HOME"
)

# What can go wrong: a name that ``errors.kinds_of`` gives an error → the message.
_SENTENCES = {
    "HFValidationError": (
        "{repo!r} is neither an existing directory or file nor a Hub id: check the path, or give"
        " an id such as 'organization/name'"
    ),
    "RepositoryNotFoundError": _NO_REPOSITORY,
    "RepositoryNotFoundError, token sent": (
        "There is no repository '{repo}' on {endpoint} that the access token may read: check the"
        " spelling (or the path, if a directory on this machine was meant), or use a token with"
        " access to it"
    ),
    "GatedRepoError": (
        "{repo} is gated and no access token was sent: accept its licence at {endpoint}/{repo},"
        " then set HF_TOKEN or log in with 'hf auth login'"
    ),
    "GatedRepoError, token sent": (
        "{repo} is gated and the access token has no access to it: accept its licence at"
        " {endpoint}/{repo} with the account of the token"
    ),
    "DisabledRepoError": ("{endpoint} has disabled {repo}: its page {endpoint}/{repo} may say why"),
    "RevisionNotFoundError": (
        "{repo} on {endpoint} has no revision '{revision}': give one of its branches, tags or full"
        " commit hashes"
    ),
    # The Hub answers 401 for a repository that does not exist, as if it were private.
    "HTTP 401": _NO_REPOSITORY,
    "HTTP 401, token sent": (
        "{endpoint} rejects the access token: set HF_TOKEN to a valid one or log in again with"
        " 'hf auth login', or remove the token where the repository is public"
    ),
    "HTTP 403": (
        "{endpoint} forbids reading '{file}' of {repo} ({reason}): use an access token that may"
        " read this repository"
    ),
    "HTTP 429": (
        "{endpoint} has had too many requests from here ({reason}): wait some minutes, or set"
        " HF_TOKEN, which raises the limit"
    ),
    "LongWaitError": (
        "{endpoint} asks to wait for {reason} before it serves '{file}' of {repo}: try again then,"
        " or set HF_TOKEN, which raises the limit"
    ),
    "WrongRangeError": (
        "{endpoint} or a proxy sends the wrong bytes of '{file}' of {repo} ({reason}): try again,"
        " or without the proxy"
    ),
    "HTTP 5xx": "{endpoint} fails to serve '{file}' of {repo} ({reason}): try again later",
    "HfHubHTTPError": (
        "{endpoint} does not serve '{file}' of {repo} ({reason}): check the id, the revision and"
        " HF_ENDPOINT"
    ),
    "FileMetadataError": (
        "{endpoint} does not answer as a Hub does when asked for '{file}' of {repo}: check"
        " HF_ENDPOINT and the proxy"
    ),
    "HTTPError": (
        "'{file}' of {repo} cannot be fetched from {endpoint} ({reason}): check the network, the"
        " proxy and HF_ENDPOINT (or the path, if a directory on this machine was meant), or set"
        " HF_HUB_OFFLINE=1 to work with what is cached"
    ),
    "OfflineModeIsEnabled": (
        "'{file}' of {repo} (revision '{revision}') is not in the cache {cache} and offline mode"
        " forbids fetching it: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or fetch it once"
        " while online"
    ),
    # Of all that is sent, only the token is not encoded beforehand.
    "UnicodeEncodeError": (
        "The access token holds characters that cannot be sent: set HF_TOKEN to the token as"
        " {endpoint}/settings/tokens shows it"
    ),
    "ENOSPC": _NO_SPACE,
    "EDQUOT": _NO_SPACE,
    "errno": (
        "'{file}' of {repo} cannot be kept in the cache {cache} ({reason}): make it writable, or"
        " choose another cache with --cache-dir or HF_HOME"
    ),
    "_DamagedDownloadError": (
        "'{file}' of {repo} arrived damaged, its {reason} is not the one that {endpoint} announced,"
        " and was deleted: try again"
    ),
    "_DamagedCacheError": (
        "'{file}' of {repo} is damaged in the cache {cache}, its {reason} is not the one that was"
        " announced, and offline mode forbids fetching it again: unset HF_HUB_OFFLINE and"
        " TRANSFORMERS_OFFLINE"
    ),
    "OutsideError": (
        "The Hub's client keeps '{file}' of {repo} outside of the cache {cache}, in {reason}, so it"
        " is not read: check HF_ENDPOINT, and the links in the cache"
    ),
    # The client's check of the size raises a bare OSError without an errno.
    "OSError": "'{file}' of {repo} did not arrive whole ({reason}): try again",
    "Exception": (
        "'{file}' of {repo} cannot be fetched from {endpoint} ({kind}: {reason}): check the id, the"
        " revision and the HF_* environment variables"
    ),
}

HEADER_GUESS = 128 << 10
"""Bytes of a safetensors file that are read first; few headers are longer."""


class HubRepository:
    """A model repository on the Hugging Face Hub; implements ``Repository``.

    Nothing is fetched until a file is requested, and then only that file.

    Args:
        repo_id: ``organization/name``, or ``name`` for one of the Hub's oldest.
        revision: a branch, a tag or a full commit hash; ``main`` if ``None``.
        hub: the cache and the token.

    Attributes:
        name: ``repo_id``, as given.
        hub: as given.
        weights: see ``Repository``.
        commit: the hash of the commit that the files come from; ``None`` before the first file.

    """

    def __init__(
        self,
        repo_id: str,
        hub: HubAccess = DEFAULT_ACCESS,
        *,
        revision: str | None = None,
    ) -> None:
        self.name = repo_id
        self.hub = hub
        self.weights: str | None = None
        self.revision = revision
        self._cache_dir = None if hub.cache_dir is None else local_path(Path(hub.cache_dir))
        self.commit: str | None = None

    def file(self, filename: str) -> Path | None:
        """Return the path of ``filename`` in the local cache, downloading it if needed.

        After the first file, all others come from the same commit, even if the branch moves on. In
        offline mode, a file that the cache of a known repository lacks counts as missing from the
        repository.

        Args:
            filename: its path within the repository, with ``/`` between folders.

        Returns:
            The path, or ``None`` if the repository has no such file.

        Raises:
            HubError: The file cannot be fetched; the message says why and what to do.

        """
        return self._get(filename)

    def holds(self, filename: str) -> bool:
        """Whether the repository has ``filename``; asks the Hub, and downloads nothing.

        Raises:
            HubError: The Hub does not answer, as for ``file``.
        """
        return self.location(filename) is not None

    def names(self) -> list[str]:
        """See ``Repository``; asks the Hub, or the cache if it does not answer."""
        from huggingface_hub import constants, list_repo_files

        try:
            if constants.HF_HUB_OFFLINE:
                return self._cached_names()
            with watched_client():
                files = list_repo_files(
                    self.name, revision=self.commit or self.revision, token=self.hub.token
                )
        except Exception:
            return self._cached_names()
        folders = {f"{parent}/" for it in files for parent in map(str, PurePosixPath(it).parents)}
        return [*files, *sorted(folders - {"./"})]

    def unseen(self) -> str | None:
        """See ``Repository``."""
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:
            return None
        return (
            f"only what is in the cache {self._cache()} was looked at, since offline mode is on: "
            "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to have the rest fetched"
        )

    def location(self, filename: str) -> Path | None:
        """Where ``filename`` is in the local cache, or would be; downloads nothing.

        ``None`` if the repository has no such file.

        Raises:
            HubError: The Hub does not answer, as for ``file``.

        """
        return self._get(filename, dry_run=True)

    def read(self, filename: str, start: int, size: int) -> tuple[bytes, int] | None:
        """Read a range of a file's bytes from the Hub; nothing is cached.

        Args:
            filename: a file that ``location`` found.
            start: the first byte.
            size: how many; fewer are returned if the file ends before.

        Returns:
            The bytes, and the size of the whole file; ``None`` if the server sends whole files
            only, or the file is empty.

        Raises:
            HubError: The bytes cannot be fetched; the message says why and what to do.

        """
        from huggingface_hub import hf_hub_url

        with self._errors_explained(filename):
            url = hf_hub_url(self.name, filename, revision=self.commit)
            return read_range(url, start, size, self.hub.token)

    def part(self, filename: str, tensors: Collection[str]) -> Path | None:
        """Return a safetensors file with those of ``tensors`` that ``filename`` holds.

        Only their bytes are fetched, since an output head is a fraction of a verifier, and kept
        beside the Hub's cache. If the server does not support ranges of bytes, or the whole file is
        cached already, the whole file is returned. The Hub announces no hash for a part, so only
        its size is checked.

        Args:
            filename: a safetensors file of the repository.
            tensors: the names that are wanted; those that the file does not hold are ignored.

        Returns:
            The path, or ``None`` if the repository has no such file.

        Raises:
            CheckpointError: the file's header is damaged.
            HubError: the part cannot be fetched; the message says why and what to do.

        """
        part = self._part_file(filename, tensors) if self.commit else None
        if part is None or not part.is_file():
            whole = self.location(filename)
            if whole is None:
                return None
            if whole.is_file():
                return self.file(filename)
            part = self._part_file(filename, tensors)
        if _is_whole(part) or self._fetch_part(filename, tensors, part):
            return part
        return self.file(filename)

    def _part_file(self, filename: str, tensors: Collection[str]) -> Path:
        """Where a part is kept: in the assets cache, the client's folder for derived files."""
        assert self.commit is not None
        folder = self._assets() / self.name.replace("/", "--") / self.commit
        digest = hashlib.sha256("\n".join([filename, *sorted(tensors)]).encode()).hexdigest()
        return folder / f"{Path(filename).stem}-{digest[:16]}.safetensors"

    def _fetch_part(self, filename: str, names: Collection[str], part: Path) -> bool:
        """Create ``part``; return whether the server supports ranges of bytes."""
        from huggingface_hub import hf_hub_url

        found = self.read(filename, 0, HEADER_GUESS)
        if found is None:
            return False
        start, size = found
        remote = Path(self.name, filename)
        data_start = find_data(start[:PREFIX_BYTES], size, remote)
        if data_start > len(start):
            start, _ = self.read(filename, 0, data_start) or (b"", 0)
        header = parse_header(start[PREFIX_BYTES:data_start], size, remote)
        wanted = {name: info for name, info in header.items() if name in names}
        with self._errors_explained(filename):
            url = hf_hub_url(self.name, filename, revision=self.commit)
            write_part(part, wanted, url, self.hub.token)
        return True

    def _get(self, filename: str, *, dry_run: bool = False) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        wanted: dict[str, Any] = {
            "repo_id": self.name,
            "filename": filename,
            "revision": self.commit or self.revision,
            "cache_dir": self._cache_dir,
        }
        try:
            with watched_client():
                if dry_run:
                    found = hf_hub_download(**wanted, dry_run=True, token=self.hub.token)
                    path = Path(found.local_path)
                    check_place(path, self._cache(), self._folder())
                else:
                    path = self._download(wanted)
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # the client lets errors of many libraries through
            if "OfflineModeIsEnabled" in kinds_of(error) and self._is_cached():
                return None
            self._explain(error, filename)
        # The cache's layout: snapshots/<commit>/<filename>.
        self.commit = path.parents[filename.count("/")].name
        return path

    def _download(self, wanted: dict[str, Any]) -> Path:
        """Get a file, and check it if that was not done before; fetch a damaged one again."""
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(**wanted)

        def download() -> Path:
            return Path(retried(lambda: hf_hub_download(**wanted, token=self.hub.token), "GET 5xx"))

        path = download()
        wrong = self._find_damage(path)
        if wrong and isinstance(cached, str) and path.samefile(cached):
            if constants.HF_HUB_OFFLINE:
                raise _DamagedCacheError(wrong)
            logger.info(f"{path} is damaged, and is fetched again")
            delete_cached(path)
            path = download()
            wrong = self._find_damage(path)
        if wrong:
            delete_cached(path)
            raise _DamagedDownloadError(wrong)
        return path

    def _find_damage(self, path: Path) -> str | None:
        """See ``find_damage``; before that, check that the path is in the cache."""
        check_place(path, self._cache(), self._folder())
        return find_damage(path, self._assets() / "checked")

    @contextmanager
    def _errors_explained(self, filename: str) -> Iterator[None]:
        try:
            with watched_client():
                yield
        except Exception as error:  # as above
            self._explain(error, filename)

    def _explain(self, error: Exception, filename: str) -> NoReturn:
        from huggingface_hub import constants

        raise_hub_error(
            error,
            _SENTENCES,
            repo=self.name,
            revision=self.revision or constants.DEFAULT_REVISION,
            file=filename,
            cache=self._cache(),
        )

    def _is_cached(self) -> bool:
        """Whether the cache holds any file of this repository at this revision."""
        return bool(self._cached_names())

    def _cached_names(self) -> list[str]:
        from huggingface_hub import constants

        folder = self._folder()
        revision = self.commit or self.revision or constants.DEFAULT_REVISION
        ref = folder / "refs" / revision
        snapshot = folder / "snapshots" / (ref.read_text() if ref.is_file() else revision)
        return [it.relative_to(snapshot).as_posix() for it in snapshot.rglob("*") if it.is_file()]

    def _folder(self) -> Path:
        """The repository's folder in the cache."""
        from huggingface_hub.file_download import repo_folder_name

        return self._cache() / repo_folder_name(repo_id=self.name, repo_type="model")

    def _assets(self) -> Path:
        """The client's folder for derived files, and in it our own."""
        from huggingface_hub import constants

        assets = self._cache_dir / "assets" if self._cache_dir else Path(constants.HF_ASSETS_CACHE)
        return assets / "speculators"

    def _cache(self) -> Path:
        from huggingface_hub import constants

        return self._cache_dir or Path(constants.HF_HUB_CACHE)


class _DamagedDownloadError(Exception):
    """The bytes that arrived are not those that the Hub announced; says by which hash."""


class _DamagedCacheError(Exception):
    """The same of bytes in the cache, which cannot be fetched again."""


def _is_whole(part: Path) -> bool:
    """Whether a part is there and as long as its header says; a damaged one is deleted."""
    if not part.is_file():
        return False
    try:
        read_safetensors_file(part)
    except CheckpointError:
        part.unlink(missing_ok=True)
        return False
    return True
