"""What the proof finds, with weights in the dtypes of real drafts, and how much memory it takes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eagle3 import GOLDEN3, OPTIONS, PARALLEL, TARGET
from helpers import (
    PLAIN,
    Tensors,
    golden_vectors,
    save_quietly,
    source_config,
    source_tensors,
    stored_tensors,
    tiny_llama,
    write_checkpoint,
)
from speculators.convert.conversion import convert as convert_any
from speculators.convert.eagle import EagleConverter
from speculators.errors import ValidationError
from speculators.families.converted import open_converted
from speculators.models import blocks
from speculators.models.eagle import EagleSpeculator

convert, validate = EagleConverter().convert, EagleConverter().validate

DTYPES: dict[str, Callable[[str], torch.dtype]] = {
    "bfloat16": lambda name: torch.bfloat16,
    "float16": lambda name: torch.float16,
    "bfloat16, norms in float32": lambda name: torch.float32 if "norm" in name else torch.bfloat16,
    "float32, the embedding in bfloat16": lambda name: (
        torch.bfloat16 if "embed" in name else torch.float32
    ),
}


def typed(dtype: Callable[[str], torch.dtype]) -> Callable[[Tensors], None]:
    """What gives each tensor a dtype of its own, without changing the values of the narrower."""

    def edit(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype(name))

    return edit


@pytest.fixture(scope="module")
def verifier16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verifier in bfloat16."""
    model = tiny_llama(golden_vectors(PLAIN)["lm_head.weight"]).bfloat16()
    return save_quietly(model, tmp_path_factory.mktemp("verifier16"))


@pytest.fixture(scope="module")
def source16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain golden checkpoint in bfloat16."""
    edit = typed(DTYPES["bfloat16"])
    return write_checkpoint(tmp_path_factory.mktemp("source16") / "source", edit=edit)


@pytest.fixture(scope="module")
def out16(tmp_path_factory: pytest.TempPathFactory, source16: Path, verifier16: Path) -> Path:
    """It, converted; tests must not change this."""
    return convert(source16, tmp_path_factory.mktemp("out16") / "out", verifier16)


# What is proven


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_as_they_are_stored_compute_the_same(
    tmp_path: Path, verifier16: Path, dtype: str
) -> None:
    """Upcast where they are used, they give what a float32 copy of the model gives."""
    source = write_checkpoint(tmp_path / "source", edit=typed(DTYPES[dtype]))
    out = convert(source, tmp_path / "out", verifier16)
    written = open_converted(out)
    copied = EagleSpeculator.from_converted(written, dtype=torch.float32)
    in_place = EagleSpeculator.from_converted(written, upcasting=True)
    assert {name: it.dtype for name, it in stored_tensors(out).items()} == {
        name: DTYPES[dtype](name) for name in stored_tensors(out)
    }
    ids, states = torch.arange(6).view(2, 3) * 50, torch.randn(2, 3, 64)
    with torch.inference_mode():
        found, expected = in_place(ids, states), copied(ids, states)
    assert found.logits.dtype == torch.float32
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("name", [PARALLEL, "speculators_qwen3_2layer", "fullvocab"])
def test_eagle3_drafts_too(tmp_path: Path, log: list[str], name: str) -> None:
    """With masks in place of states, several layers, or a head of their own over all tokens."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(GOLDEN3 / name / "config.json", source)
    tensors = load_file(GOLDEN3 / name / "model.safetensors")
    weights = {key: it.bfloat16() for key, it in tensors.items() if it.is_floating_point()}
    save_file(tensors | weights, source / "model.safetensors")
    out = convert_any(source, tmp_path / "out", TARGET, options=OPTIONS.get(name))
    validate(out, source)
    assert not [line for line in log if line.startswith("WARNING") and "compared" in line]


def test_transposed_matrices_are_read_as_a_whole(
    tmp_path: Path, verifier16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that lie across the file are not gathered block by block, each time from all of it."""

    def transpose(tensors: Tensors) -> None:
        typed(DTYPES["bfloat16"])(tensors)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = tensor.t().contiguous().t()

    source = write_checkpoint(tmp_path / "source", edit=transpose, container="pytorch_model.bin")
    monkeypatch.setattr(blocks, "BLOCK", 256)
    read, counted = os.pread, [0]

    def count(*arguments: int) -> bytes:
        data = read(*arguments)
        counted[0] += len(data)
        return data

    monkeypatch.setattr(os, "pread", count)
    convert(source, tmp_path / "out", verifier16)
    # To hash, to copy, to compare, and for each of the two sequences; beside it the verifier's head
    assert counted[0] < 6 * (source / "pytorch_model.bin").stat().st_size


@pytest.fixture
def tampered(tmp_path: Path, out16: Path) -> Callable[[Callable[[bytearray], None]], Path]:
    """Makes a converted directory, without its record, whose file of weights was changed."""

    def tamper(edit: Callable[[bytearray], None]) -> Path:
        out = tmp_path / "tampered"
        out.mkdir()
        (out / "config.json").write_bytes((out16 / "config.json").read_bytes())
        data = bytearray((out16 / "model.safetensors").read_bytes())
        edit(data)
        (out / "model.safetensors").write_bytes(data)
        return out

    return tamper


def place(out: Path, name: str) -> slice:
    """Where the bytes of a tensor lie, by the file's own header."""
    data = (out / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    return slice(8 + size + begin, 8 + size + end)


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "fc.weight", "layers.0.mlp.down_proj.weight"]
)
@pytest.mark.parametrize("byte", [0, -1], ids=["first", "last"])
def test_a_flipped_bit_is_found(
    source16: Path, out16: Path, tampered: Any, name: str, byte: int
) -> None:
    """The lowest bit of one of a matrix's numbers, which changes next to nothing."""
    where = place(out16, name)

    def flip(data: bytearray) -> None:
        data[where.start + 2 if byte == 0 else where.stop - 2] ^= 1

    with pytest.raises(ValidationError, match=rf"{name} differs from"):
        validate(tampered(flip), source16)


def test_swapped_tensors_are_found(source16: Path, out16: Path, tampered: Any) -> None:
    gate, up = (place(out16, f"layers.0.mlp.{name}_proj.weight") for name in ("gate", "up"))

    def swap(data: bytearray) -> None:
        data[gate], data[up] = data[up], data[gate]

    with pytest.raises(ValidationError, match=r"_proj\.weight differs from"):
        validate(tampered(swap), source16)


Spoil = Callable[[EagleSpeculator], None]


def swap_projections(model: EagleSpeculator) -> None:
    mlp: Any = model.layers[0].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight


def change_row_of_head(model: EagleSpeculator) -> None:
    weight: Any = model.borrowed_head.weight  # type: ignore[union-attr]
    weight.stored[-1] = weight.stored[0]


def see_everything(model: EagleSpeculator) -> None:
    layer: Any = model.layers[0]
    layer.self_attn.is_causal = False


def see_one_token_ahead(model: Any) -> None:
    inputs = model._attention_inputs

    def shifted(x: Tensor, *arguments: Any) -> Any:
        cache, attention = inputs(x, *arguments)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(1)
        return cache, attention | {"attention_mask": seen[None, None]}

    model._attention_inputs = shifted


def turn_the_slowest_less(model: EagleSpeculator) -> None:
    """As if RoPE's scaling for long contexts were left out, which the first tokens hardly show."""
    model.rotary_emb.inv_freq[-1] /= 8  # type: ignore[index, operator]


def mix_the_sequences(model: Any) -> None:
    draft = model.draft

    def mixed(*arguments: Any, **options: Any) -> Any:
        output = draft(*arguments, **options)
        output.last_hidden_state = output.last_hidden_state.mean(0, keepdim=True).expand(2, -1, -1)
        return output

    model.draft = mixed


SPOILT: dict[str, tuple[Spoil, str]] = {
    "projections swapped": (swap_projections, "The output is not what the source's tensors"),
    "a row of the head": (change_row_of_head, "The logits are not those of the verifier's head"),
    "a mask that hides nothing": (see_everything, "the attention is not causal"),
    "a mask that hides too little": (see_one_token_ahead, "the attention is not causal"),
    "RoPE's slowest channel": (turn_the_slowest_less, "The angles of RoPE are not those"),
    "sequences of a batch mixed": (mix_the_sequences, "The output is not what the source's"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_model_that_computes_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch, out16: Path, case: str
) -> None:
    """The files are right; the model is changed after it was loaded from them."""
    spoil, words = SPOILT[case]
    load = EagleSpeculator.from_converted.__func__  # type: ignore[attr-defined]

    def spoilt(cls: type[EagleSpeculator], *arguments: Any, **options: Any) -> EagleSpeculator:
        model: EagleSpeculator = load(cls, *arguments, **options)
        spoil(model)
        return model

    monkeypatch.setattr(EagleSpeculator, "from_converted", classmethod(spoilt))
    with pytest.raises(ValidationError, match=words):
        validate(out16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_last_row_that_is_not_finite_is_found(
    tmp_path: Path, verifier16: Path, value: float
) -> None:
    def spoil(tensors: Tensors) -> None:
        typed(DTYPES["bfloat16"])(tensors)
        tensors["embed_tokens.weight"][-1, -1] = value

    source = write_checkpoint(tmp_path / "source", edit=spoil)
    with pytest.raises(ValidationError, match=r"embed_tokens\.weight has values that are not fin"):
        convert(source, tmp_path / "out", verifier16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_verifiers_last_row_that_is_not_finite_is_found(
    tmp_path: Path, source16: Path, value: float
) -> None:
    head = golden_vectors(PLAIN)["lm_head.weight"].clone()
    head[-1, -1] = value
    verifier = save_quietly(tiny_llama(head).bfloat16(), tmp_path / "verifier")
    with pytest.raises(ValidationError, match=r"borrowed_head\.weight .* verifier .* is damaged"):
        convert(source16, tmp_path / "out", verifier)
    assert not (tmp_path / "out").exists()


# What it takes

HIDDEN, VOCABULARY, INNER = 512, 32768, 64

PEAK = """
import json, sys, threading
import speculators.convert.checks.embedding, speculators.convert.checks.recurrent
import speculators.models.eagle, speculators.convert.references.eagle
from speculators.convert.eagle import EagleConverter
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024
before, peak, done = anonymous(), [0], threading.Event()
def poll():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=poll)
thread.start()
source, out, verifier = sys.argv[1:]
converter = EagleConverter()
converter.convert(source, out, verifier)
converter.validate(out, source)
done.set()
thread.join()
print(json.dumps(peak[0] - before))
"""


def random16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.05)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_memory_does_not_grow_with_embedding_and_head(tmp_path: Path) -> None:
    """A float32 copy of either would take all that is allowed."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    source, verifier = tmp_path / "source", tmp_path / "verifier"
    for directory in (source, verifier):
        directory.mkdir()
        config = source_config() | sizes | {"torch_dtype": "bfloat16"}
        (directory / "config.json").write_text(json.dumps(config))
    of = {64: HIDDEN, 128: 2 * HIDDEN, 176: INNER, 32: HIDDEN // 2, 320: VOCABULARY}
    save_file(
        {
            name: random16(*(of[size] for size in tensor.shape))
            for name, tensor in source_tensors().items()
        },
        source / "model.safetensors",
    )
    save_file({"lm_head.weight": random16(VOCABULARY, HIDDEN)}, verifier / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, source, tmp_path / "out", verifier],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) < 4 * VOCABULARY * HIDDEN
