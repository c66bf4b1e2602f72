"""The access token that is given to ``from_pretrained``."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import PLAIN, config_of
from hub_server import MEMBER, HubServer, patch_hub
from speculators.errors import HubError
from speculators.models import load_draft


@pytest.fixture
def server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verifier: Path, converted: dict[str, Path]
) -> Iterator[HubServer]:
    """A Hub with a private draft and its private verifier, and no token in the environment."""
    draft = tmp_path / "draft"
    draft.mkdir()
    text = (converted[PLAIN] / "config.json").read_text()
    name = config_of(converted[PLAIN])["speculators_config"]["verifier"]["name_or_path"]
    (draft / "config.json").write_text(text.replace(name, "org/verifier"))
    (draft / "model.safetensors").symlink_to(converted[PLAIN] / "model.safetensors")
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN="")
        server.add_repo("org/draft", draft, private=True)
        server.add_repo("org/verifier", verifier, private=True)
        yield server


def test_the_draft_and_its_verifier_are_read_with_it(
    server: HubServer, tmp_path: Path, log: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HubError, match="set HF_TOKEN if the repository is private"):
        load_draft("org/draft", cache_dir=tmp_path / "none")
    both = load_draft("org/draft", token=MEMBER, verifier="auto", cache_dir=tmp_path / "both")
    assert both.verifier is not None
    printed = capfd.readouterr()
    assert MEMBER not in "\n".join([*log, printed.out, printed.err])


def test_a_token_is_in_no_message(server: HubServer, tmp_path: Path, log: list[str]) -> None:
    with pytest.raises(HubError, match="rejects the access token") as error:
        load_draft("org/draft", token="hf_unknownToEverybody", cache_dir=tmp_path / "none")
    assert "hf_unknown" not in str(error.value)
    assert "hf_unknown" not in "\n".join(log)


def test_no_token_is_sent_if_none_is_wanted(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_hub(monkeypatch, server, tmp_path / "cache", HF_TOKEN=MEMBER)
    assert load_draft("org/draft", cache_dir=tmp_path / "one") is not None
    with pytest.raises(HubError, match="There is no public repository"):
        load_draft("org/draft", token=False, cache_dir=tmp_path / "other")
