"""From the Hub, only headers and the MTP's own bytes are fetched."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import config_of, stored_tensors
from hub_server import HubServer, Request, patch_hub
from mtp_verifiers import bytes_of, load_all, mtp_of, write_verifier
from speculators.checkpoint import headers
from speculators.checkpoint.hub import repository
from speculators.mtp.cut import cut
from speculators.mtp.graft import graft

BODY_BYTES = 8 << 20
HEADER_BYTES = 16 << 10
"""How much of a shard is read to learn what is in it; more than the headers have here."""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _patched(monkeypatch: pytest.MonkeyPatch, server: HubServer, tmp_path: Path) -> None:
    patch_hub(monkeypatch, server, tmp_path / "cache")
    for module, name in ((repository, "HEADER_GUESS"), (headers, "FIRST_BYTES")):
        monkeypatch.setattr(module, name, HEADER_BYTES)


def with_a_large_body(directory: Path) -> Path:
    """Add some megabytes of body to the last shard, without writing them: the file has a hole."""
    shard = sorted(directory.glob("model*.safetensors"))[-1]
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = max(it["data_offsets"][1] for name, it in header.items() if name != "__metadata__")
    name = "model.visual.blocks.0.attn.qkv.weight"
    header[name] = {"dtype": "U8", "shape": [BODY_BYTES], "data_offsets": [end, end + BODY_BYTES]}
    encoded = json.dumps(header).encode()
    with shard.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
        file.truncate(8 + len(encoded) + end + BODY_BYTES)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        said = json.loads(index.read_text())
        said["weight_map"][name] = shard.name
        index.write_text(json.dumps(said))
    return directory


def sent(requests: list[Request], directory: Path) -> int:
    """The bytes of weight files that were sent."""
    total = 0
    for request in requests:
        if request.method == "GET" and request.file and request.file.endswith(".safetensors"):
            size = (directory / request.file).stat().st_size
            assert request.range is not None, f"{request.file} was fetched whole"
            first, last = map(int, request.range.removeprefix("bytes=").split("-"))
            total += min(last + 1, size) - first
    return total


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v3"])
def test_only_headers_and_the_mtp_are_fetched(
    tmp_path: Path, server: HubServer, kind: str, shards: int
) -> None:
    verifier = with_a_large_body(write_verifier(tmp_path / "verifier", kind, shards=shards))
    server.add_repo("org/verifier", verifier)
    cut("org/verifier", tmp_path / "out", cache_dir=tmp_path / "cache")
    mtp = mtp_of(kind)
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(mtp)
    own = sum(it.nbytes for it in mtp.values())
    requests = [it for it in server.requests if "/cdn/" in it.path]
    # A single file's header is read twice: to see whether there is an MTP, and to fetch it.
    most = own + (2 if shards == 1 else 1) * HEADER_BYTES
    assert own < sent(requests, verifier) <= most < BODY_BYTES / 100
    # No shard of the body is touched, and neighbouring tensors come in one request.
    files = {it.file for it in requests}
    assert len(files) == 1
    gets = [
        it for it in requests if it.method == "GET" and it.range != f"bytes=0-{HEADER_BYTES - 1}"
    ]
    assert 1 <= len(gets) < len(mtp) / 2


def test_what_llamacpp_takes_is_fetched_alone(tmp_path: Path, server: HubServer) -> None:
    verifier = with_a_large_body(write_verifier(tmp_path / "verifier", shards=3))
    server.add_repo("org/verifier", verifier)
    out = cut("org/verifier", tmp_path / "out", to="llamacpp")
    beside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    taken = mtp_of("qwen3_next") | {it: load_all(verifier)[it] for it in beside}
    assert bytes_of(stored_tensors(out)) == bytes_of(taken)
    assert (out / "tokenizer.json").read_bytes() == (verifier / "tokenizer.json").read_bytes()
    requests = [it for it in server.requests if "/cdn/" in it.path]
    assert sent(requests, verifier) < BODY_BYTES / 100


def test_a_second_cut_fetches_nothing_again(tmp_path: Path, server: HubServer) -> None:
    server.add_repo("org/verifier", write_verifier(tmp_path / "verifier"))
    cut("org/verifier", tmp_path / "one")
    server.requests.clear()
    cut("org/verifier", tmp_path / "two")
    assert not [it for it in server.requests if it.method == "GET" and "/cdn/" in it.path]
    one, two = (tmp_path / it / "model.safetensors" for it in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_an_mtp_on_the_hub_is_grafted(tmp_path: Path, server: HubServer) -> None:
    donor = with_a_large_body(write_verifier(tmp_path / "donor"))
    server.add_repo("org/donor", donor, revision="v1")
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    out = graft(verifier, "org/donor", tmp_path / "out", revision="v1")
    assert bytes_of(load_all(out)) == bytes_of({**load_all(verifier), **mtp_of("qwen3_next")})
    assert config_of(out)["num_nextn_predict_layers"] == 1
    assert sent([it for it in server.requests if "/cdn/" in it.path], donor) < BODY_BYTES / 100


def test_a_server_without_ranges_sends_the_shard_whole(tmp_path: Path, server: HubServer) -> None:
    verifier = write_verifier(tmp_path / "verifier", shards=2)
    server.add_repo("org/verifier", verifier)
    server.fail("model-00002-of-00002.safetensors", whole=True)
    cut("org/verifier", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert bytes_of(found) == bytes_of(mtp_of("qwen3_next"))
