"""Which tensor of a verifier is its head and its embedding, and a draft's own beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import (
    HIDDEN,
    PLAIN,
    VOCABULARY,
    Tensors,
    golden_vectors,
    source_tensors,
    write_checkpoint,
)
from speculators.checkpoint.verifier import open_verifier
from speculators.convert.eagle import EagleConverter
from speculators.errors import (
    CheckpointError,
    ConversionError,
    IncompleteVerifierError,
    ValidationError,
    VerifierError,
)
from speculators.models.eagle import EagleSpeculator

convert = EagleConverter().convert
validate = EagleConverter().validate


def matrix(seed: int, deviation: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, HIDDEN, generator=generator) * deviation


HEAD, EMBEDDING = golden_vectors(PLAIN)["lm_head.weight"], matrix(1)


def write_verifier(directory: Path, tensors: Tensors, **config: Any) -> Path:
    directory.mkdir()
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY}
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["SomeForCausalLM"], **sizes, **config})
    )
    save_file({"x.norm.weight": torch.ones(HIDDEN), **tensors}, directory / "model.safetensors")
    return directory


def values(info: Any) -> Tensor:
    raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(info.shape)


HEADS = [
    "lm_head.weight",
    "language_model.lm_head.weight",
    "model.lm_head.weight",
    "thinker.lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "transformer.output_layer.weight",
    "head.weight",
    "lm_head.out_proj.weight",
]
EMBEDDINGS = [
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.text_model.embed_tokens.weight",
    "thinker.model.embed_tokens.weight",
    "transformer.wte.weight",
    "language_model.transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "word_embeddings.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "language_model.model.decoder.embed_tokens.weight",
    "backbone.embeddings.weight",
    "model.embeddings.tok_embeddings.weight",
    "tok_embeddings.weight",
    "rwkv.embeddings.weight",
    "transformer.embedding.word_embeddings.weight",
]


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("name", HEADS)
def test_a_stored_head_is_the_head_whatever_the_flag_says(
    tmp_path: Path, name: str, tied: bool | None
) -> None:
    tensors = {name: HEAD, "model.embed_tokens.weight": EMBEDDING}
    path = write_verifier(tmp_path / "v", tensors, tie_word_embeddings=tied)
    assert torch.equal(values(open_verifier(path).head()), HEAD)


@pytest.mark.parametrize(
    "config",
    [
        {"n_embd": HIDDEN, "vocab_size": VOCABULARY, "n_layer": 3},
        {"d_model": HIDDEN, "padded_vocab_size": VOCABULARY, "num_layers": 3},
        {"llm_config": {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_hidden_layers": 3}},
        {
            "hidden_size": 1,
            "thinker_config": {
                "vision_config": {"hidden_size": 2},
                "text_config": {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "n_layers": 3},
            },
        },
        {
            "hidden_size": HIDDEN,
            "vocab_size": VOCABULARY,
            "num_layers": 3,
            "language_config": {"languages": ["en"]},
        },
    ],
    ids=["GPT-2", "ChatGLM", "InternVL", "Qwen-Omni", "no part"],
)
def test_sizes_are_read_in_every_spelling(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
    verifier = open_verifier(tmp_path)
    assert (verifier.hidden_size, verifier.vocab_size, verifier.layers) == (HIDDEN, VOCABULARY, 3)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {},
        {"text_config": {"hidden_size": HIDDEN, "vocab_size": VOCABULARY}},
        {
            "tie_word_embeddings": False,
            "text_config": {
                "hidden_size": HIDDEN,
                "vocab_size": VOCABULARY,
                "tie_word_embeddings": True,
            },
        },
    ],
    ids=["tied", "not said", "in two parts", "tied in a part"],
)
def test_without_a_head_the_embedding_is_it(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    verifier = open_verifier(write_verifier(tmp_path / "v", {name: EMBEDDING}, **config))
    assert torch.equal(values(verifier.head()), EMBEDDING)
    assert torch.equal(values(verifier.embedding()), EMBEDDING)


def test_logits_are_those_of_the_stored_head(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": HEAD, "model.embed_tokens.weight": EMBEDDING}
    verifier = write_verifier(tmp_path / "v", tensors, tie_word_embeddings=True)
    source = write_checkpoint(
        tmp_path / "s", edit=lambda t: t.update({"lm_head.weight": HEAD.clone()})
    )
    out = convert(source, tmp_path / "out", verifier)
    model = EagleSpeculator.from_pretrained(out)
    head = model.get_output_embeddings()
    assert head is not None
    assert torch.equal(head.weight.float(), HEAD)


@pytest.mark.parametrize(
    ("tensors", "config", "pattern"),
    [
        ({}, {}, "has no tensor for its output head"),
        ({"model.strange.weight": EMBEDDING}, {}, "has no tensor for its output head"),
        (
            {"model.embed_tokens.weight": EMBEDDING},
            {"tie_word_embeddings": False},
            "config.json says that it is not the embedding",
        ),
        ({"lm_head.weight": HEAD[:-1]}, {}, r"output head \(lm_head.weight\) of shape \(319, 64\)"),
    ],
    ids=["norms only", "no name that is known", "untied without a head", "another shape"],
)
def test_a_verifier_with_weights_and_no_head_is_an_error(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any], pattern: str
) -> None:
    verifier = write_verifier(tmp_path / "v", tensors, **config)
    source = write_checkpoint(tmp_path / "s")
    with pytest.raises(IncompleteVerifierError, match=pattern):
        convert(source, tmp_path / "out", verifier)
    assert not (tmp_path / "out").exists()


def test_a_verifier_without_the_embedding_that_a_draft_borrows(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "v", {"lm_head.weight": HEAD})
    source = write_checkpoint(tmp_path / "s", edit=lambda t: t.pop("embed_tokens.weight"))
    with pytest.raises(IncompleteVerifierError, match="has no tensor for its embedding"):
        convert(source, tmp_path / "out", verifier)


def test_a_quantized_head_is_not_replaced_by_the_embedding(tmp_path: Path) -> None:
    tensors = {
        "lm_head.qweight": torch.zeros(8, VOCABULARY, dtype=torch.int32),
        "model.embed_tokens.weight": EMBEDDING,
    }
    verifier = open_verifier(write_verifier(tmp_path / "v", tensors))
    with pytest.raises(VerifierError, match="in the type I32"):
        verifier.head()


# A draft's own head


def with_head(head: Tensor, **others: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({"lm_head.weight": head.clone(), **others})


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize(
    ("head", "others", "pattern"),
    [
        (HEAD[::2], {}, r"has 160 of 320 rows: .*frequency-trimmed vocabulary"),
        (
            HEAD[::2],
            {"token_map": torch.arange(160)},
            r"has 160 of 320 rows: .*frequency-trimmed vocabulary",
        ),
        (torch.ones(320, 63), {}, r"lm_head.weight has the shape \(320, 63\)"),
        (torch.ones(400, 64), {}, r"lm_head.weight has the shape \(400, 64\)"),
    ],
    ids=["trimmed", "trimmed with a map", "narrow", "more rows"],
)
def test_the_shape_of_an_own_head_is_always_checked(
    tmp_path: Path,
    verifier: Path,
    head: Tensor,
    others: Tensors,
    pattern: str,
    validated: bool,
) -> None:
    source = write_checkpoint(tmp_path / "s", edit=with_head(head, **others))
    with pytest.raises(ConversionError, match=pattern):
        convert(source, tmp_path / "out", verifier, validate=validated)


UNCHECKED = "lm_head.weight of the draft was left out unchecked"


def test_an_own_head_is_told_without_validation(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    source = write_checkpoint(tmp_path / "s", edit=with_head(matrix(2)))
    convert(source, tmp_path / "out", verifier, validate=False)
    assert any(line.startswith(f"WARNING {UNCHECKED}") for line in log)
    log.clear()
    validate(tmp_path / "out")
    assert any(UNCHECKED in line for line in log)


def test_an_own_head_is_told_if_the_verifier_has_no_weights(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((verifier / "config.json").read_bytes())
    source = write_checkpoint(tmp_path / "s", edit=with_head(matrix(2)))
    out = convert(source, tmp_path / "out", bare)
    assert any(line.startswith(f"WARNING {UNCHECKED}") for line in log)
    record = json.loads((out / "conversion.json").read_text())
    assert any(UNCHECKED in line for line in record["unchecked"])
    log.clear()
    validate(out)
    assert any(UNCHECKED in line for line in log)


def test_an_own_head_that_is_not_the_verifiers(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "s", edit=with_head(matrix(2)))
    with pytest.raises(ValidationError, match="not the verifier's"):
        convert(source, tmp_path / "out", verifier)


def test_a_damaged_verifier_is_no_missing_one(tmp_path: Path) -> None:
    """Its weights are there, so nobody wants a conversion without proof."""
    path = write_verifier(
        tmp_path / "v", {"lm_head.weight": HEAD, "embed_tokens.weight": EMBEDDING}
    )
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for edit in (lambda _: None, lambda it: it.pop("embed_tokens.weight")):
        source = write_checkpoint(tmp_path / f"s{edit}", edit=edit)
        with pytest.raises(CheckpointError, match="is truncated"):
            convert(source, tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


def test_weights_that_were_not_fetched_are_missing_ones(tmp_path: Path, log: list[str]) -> None:
    """As after a clone without Git LFS, or a download of ``*.json`` alone."""
    source = write_checkpoint(tmp_path / "s")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for name, content in (
        ("model.safetensors", pointer),
        ("model.safetensors.index.json", b'{"weight_map": {"lm_head.weight": "a.safetensors"}}'),
    ):
        path = write_verifier(tmp_path / name, {})
        (path / "model.safetensors").unlink()
        (path / name).write_bytes(content)
        convert(source, tmp_path / f"out {name}", path)
        assert any("Logits were not validated" in line for line in log[-4:])


def test_a_quantized_head_does_not_take_the_embedding_away(tmp_path: Path, log: list[str]) -> None:
    tensors = {"lm_head.qweight": torch.ones(8, 8).int(), "model.embed_tokens.weight": EMBEDDING}
    path = write_verifier(tmp_path / "v", tensors)
    source = write_checkpoint(tmp_path / "s", edit=lambda it: it.pop("embed_tokens.weight"))
    out = convert(source, tmp_path / "out", path)
    warnings = [line for line in log if line.startswith("WARNING")]
    assert not any("embedding is not available" in line for line in warnings)
    model = EagleSpeculator.from_pretrained(out)
    assert model.borrowed_head is None
    assert model.borrowed_embedding is not None
    assert torch.equal(model.borrowed_embedding.weight, EMBEDDING)


# An embedding that nobody trained


@pytest.mark.parametrize("deviation", [0.02, 1.0, 0.05])
@pytest.mark.parametrize("of_the_verifier", [True, False])
def test_an_embedding_that_looks_untrained_is_told(
    tmp_path: Path, log: list[str], deviation: float, of_the_verifier: bool
) -> None:
    own = matrix(3, deviation)
    tensors = {
        "lm_head.weight": HEAD,
        "model.embed_tokens.weight": own if of_the_verifier else EMBEDDING,
    }
    verifier = write_verifier(tmp_path / "v", tensors)
    source = write_checkpoint(
        tmp_path / "s", edit=lambda t: t.update({"embed_tokens.weight": own.clone()})
    )
    convert(source, tmp_path / "out", verifier)
    told = any(line.startswith("WARNING embed_tokens.weight looks untrained") for line in log)
    assert told == (deviation != 0.05 and not of_the_verifier)


def test_a_trained_embedding_of_the_same_deviation_is_not_told(
    tmp_path: Path, log: list[str]
) -> None:
    """Trained rows differ in size: rare tokens keep theirs, and frequent ones grow."""
    own = matrix(3, 0.02) * torch.linspace(0.2, 1.7, VOCABULARY)[:, None]
    own *= 0.02 / own.std()
    verifier = write_verifier(
        tmp_path / "v", {"lm_head.weight": HEAD, "model.embed_tokens.weight": EMBEDDING}
    )
    source = write_checkpoint(tmp_path / "s", edit=lambda t: t.update({"embed_tokens.weight": own}))
    convert(source, tmp_path / "out", verifier)
    assert not any("looks untrained" in line for line in log)


def test_the_golden_head_is_no_embedding() -> None:
    """What the tests above tell apart is different."""
    assert not torch.equal(HEAD, EMBEDDING)
    assert source_tensors()["fc.weight"].shape == (HIDDEN, 2 * HIDDEN)
