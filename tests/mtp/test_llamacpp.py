"""`speculators mtp cut --to llamacpp`: what llama.cpp's converter reads with --mtp, and no more.

With build 11434, `convert_hf_to_gguf.py --mtp` made the same GGUF, tensor by tensor and key by key,
of what is cut as of the whole verifier: of Qwen3-Next (`golden-families/mtp_qwen3_next` with a
vocabulary of 49,152), a Qwen3.5 with vision and a tied head, and a GLM-4-MoE. Of what is cut,
llama-server then drafted what docs/mtp.md says.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
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


def three_layers() -> Tensors:
    """An MTP of MiMo-V2 with as many layers as llama.cpp's converter expects."""
    mtp = mtp_of("mimo_v2_flash")
    copies = [(f".layers.{layer}.", name, it) for layer in range(3) for name, it in mtp.items()]
    return {name.replace(".layers.0.", layer): it.clone() for layer, name, it in copies}


@pytest.mark.parametrize("kind", ["qwen3_next", "mimo_v2_flash", "hy_v3"])
def test_it_has_what_the_converter_keeps(tmp_path: Path, kind: str) -> None:
    mtp = three_layers() if kind == "mimo_v2_flash" else mtp_of(kind)
    verifier = write_verifier(tmp_path / kind, kind, mtp=mtp, spread=True)
    (verifier / "vocab.json").write_text("{}")
    cut(verifier, tmp_path / "out", to="llamacpp")
    assert len(of_the_verifier(verifier)) == len(BESIDE)
    expected = {**mtp, **of_the_verifier(verifier)}
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
    "DeepSeek-V3": ("deepseek_v3", {}, "DeepseekV3ForCausalLM, of which .* runs no MTP alone"),
    "no architecture": ("glm4v_moe", {}, "has no list of architectures in its config.json"),
    "several layers": (
        "qwen3_5_moe",
        {"architectures": ["Qwen3_5MoeForCausalLM"]},
        r"an MTP of 2 layer\(s\), and llama\.cpp runs .* Qwen3_5MoeForCausalLM only if it has 1;",
    ),
    "M-RoPE in GLM": (
        "glm4v_moe",
        {"architectures": ["Glm4vMoeForConditionalGeneration"]},
        "Glm4vMoeForConditionalGeneration, of which llama.cpp runs no MTP alone",
    ),
    "fewer layers": ("mimo_v2_flash", {}, "an MTP of 1 layer.* only if it has 3;"),
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


def test_queries_keys_and_values_of_mimo_v2_are_one_matrix(tmp_path: Path) -> None:
    mtp = three_layers()
    place = "model.mtp.layers.0.self_attn"
    mtp[f"{place}.qkv_proj.weight"] = torch.ones(4, 16)
    together = write_verifier(tmp_path / "together", "mimo_v2_flash", mtp=mtp)
    cut(together, tmp_path / "out", to="llamacpp")
    mtp[f"{place}.q_proj.weight"] = mtp.pop(f"{place}.qkv_proj.weight")
    apart = write_verifier(tmp_path / "apart", "mimo_v2_flash", mtp=mtp)
    with pytest.raises(ConversionError, match="queries, keys and values in matrices of their own"):
        cut(apart, tmp_path / "refused", to="llamacpp")


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
