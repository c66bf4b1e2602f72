"""`speculators mtp cut --to llamacpp`: what llama.cpp's converter reads with --mtp, and no more.

With build 11434, `convert_hf_to_gguf.py --mtp` made the same GGUF, tensor by tensor and key by key,
of what is cut as of the whole verifier: of Qwen3-Next (`golden-families/mtp_qwen3_next` with a
vocabulary of 49,152), a Qwen3.5 with vision and a tied head, and a GLM-4-MoE.
"""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers import CommandLine, Tensors, config_of, entries, stored_tensors
from hub_server import HubServer, patch_hub
from mtp_verifiers import VERIFIERS, bytes_of, load_all, mtp_of, write_verifier
from speculators.errors import ConversionError
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.mtp.cut import cut

BESIDE = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
"""How the names end that build 11434 keeps of a verifier's body."""


def of_the_verifier(directory: Path) -> Tensors:
    """The embedding, the final norm and the head."""
    kind = VERIFIERS[next(it for it in VERIFIERS if it in str(directory))]
    return {
        name: it
        for name, it in load_all(directory).items()
        if name in kind.body and name.endswith(BESIDE) and "layers" not in name
    }


@pytest.mark.parametrize("kind", ["qwen3_next", "glm4v_moe", "mimo_v2_flash", "hy_v3"])
def test_it_has_what_the_converter_keeps(tmp_path: Path, kind: str) -> None:
    config = {"architectures": ["Glm4vMoeForConditionalGeneration"]} if kind == "glm4v_moe" else {}
    verifier = write_verifier(tmp_path / kind, kind, config=config, spread=True)
    (verifier / "vocab.json").write_text("{}")
    cut(verifier, tmp_path / "out", to="llamacpp")
    assert len(of_the_verifier(verifier)) == len(BESIDE)
    expected = {**mtp_of(kind), **of_the_verifier(verifier)}
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(expected)
    assert entries(tmp_path / "out") == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.json",
    ]
    assert config_of(tmp_path / "out")["architectures"] == config_of(verifier)["architectures"]


def test_a_tied_head_need_not_be_there(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "qwen3_next", shards=1)
    tensors = load_file(verifier / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, verifier / "model.safetensors")
    with pytest.raises(ConversionError, match="lacks the verifier's head"):
        cut(verifier, tmp_path / "out", to="llamacpp")
    tied = write_verifier(
        tmp_path / "tied", shards=1, config={"tie_word_embeddings": True}, mtp=mtp_of("qwen3_next")
    )
    save_file(tensors, tied / "model.safetensors")
    cut(tied, tmp_path / "out", to="llamacpp")
    assert "model.embed_tokens.weight" in stored_tensors(tmp_path / "out")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "DeepSeek-V3": ("deepseek_v3", {}, "DeepseekV3ForCausalLM, whose MTP .* does not take alone"),
    "no architecture": ("glm4v_moe", {}, "has no list of architectures in its config.json"),
    "several layers": (
        "qwen3_5_moe",
        {"architectures": ["Qwen3_5MoeForCausalLM"]},
        "has an MTP of several layers, and llama.cpp runs only one",
    ),
    "an embedding of its own": ("qwen3_5", {}, "has an embedding of the MTP's own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_take_is_refused(tmp_path: Path, name: str) -> None:
    kind, config, words = REFUSED[name]
    verifier = write_verifier(tmp_path / "verifier", kind, config=config)
    with pytest.raises(ConversionError, match=words):
        cut(verifier, tmp_path / "out", to="llamacpp")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", VERIFIERS)
def test_inspect_promises_what_cut_does(tmp_path: Path, kind: str) -> None:
    """Of that very MTP, cut out or not, and in the same words."""
    verifier = write_verifier(tmp_path / "verifier", kind)
    why = None
    try:
        cut(verifier, tmp_path / "for llama.cpp", to="llamacpp")
    except ConversionError as error:
        why = str(error)
    found = inspect_checkpoint(cut(verifier, tmp_path / "mtp"))
    served = {it.engine for it in found.serving or ()}
    assert ("llama.cpp" in served) == (why is None)
    assert ("served by" in (said := str(found.conversion.why_not))) == bool(served)
    assert ("llama.cpp" in said) == (why is None)
    for refusal in found.not_serving:
        assert refusal.engine == "llama.cpp"
        assert refusal.why.removeprefix("it ") in str(why)


def test_an_mtp_that_was_cut_lacks_the_rest(tmp_path: Path, speculators: CommandLine) -> None:
    mtp = cut(write_verifier(tmp_path / "verifier"), tmp_path / "mtp")
    run = speculators("mtp", "cut", mtp, tmp_path / "out", "--to", "llamacpp")
    (error,) = run.errors
    assert error == (
        f"{mtp} lacks the verifier's embedding, which llama.cpp's draft holds beside the MTP; give "
        "the verifier."
    )


def test_of_the_hub_nothing_else_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = write_verifier(tmp_path / "qwen3_next", shards=3)
    with HubServer() as server:
        patch_hub(monkeypatch, server, tmp_path / "cache")
        server.add_repo("org/verifier", verifier)
        cut("org/verifier", tmp_path / "out", to="llamacpp")
    expected = {**mtp_of("qwen3_next"), **of_the_verifier(verifier)}
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(expected)
    assert "tokenizer.json" in entries(tmp_path / "out")
