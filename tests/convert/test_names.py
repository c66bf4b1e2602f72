"""What the names and shapes of a source's tensors say: prefixes, fused matrices, other kinds."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import CommandLine, Tensors, source_tensors, stored_tensors, write_checkpoint
from speculators.convert.eagle import EagleConverter
from speculators.errors import ConversionError

convert = EagleConverter().convert
validate = EagleConverter().validate


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        there = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(there)

    return edit


# Prefixes


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "ea_layer.", "draft_model.", "module.model.", "a.b.c.", "layers."],
)
@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_a_prefix_of_all_names_is_taken_off_and_told(
    tmp_path: Path, verifier: Path, log: list[str], prefix: str, container: str
) -> None:
    source = write_checkpoint(
        tmp_path / "s", edit=renamed(lambda name: prefix + name), container=container
    )
    out = convert(source, tmp_path / "out", verifier, validate=False)
    expected, found = source_tensors(), stored_tensors(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    taken = prefix.removesuffix("model.") if prefix == "module.model." else prefix
    assert f"INFO The tensors' names begin with {taken}, which is taken off" in log


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name if name.startswith("fc") else f"model.{name}",
        lambda name: f"model.{name}" if name.startswith("fc") else f"model.model.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: "_fsdp_wrapped_module." + name.replace("mlp", "_orig_mod.mlp"),
    ],
    ids=["model, but not of fc", "model.model, but not of fc", "compiled layers", "FSDP"],
)
def test_other_prefixes(tmp_path: Path, verifier: Path, rename: Callable[[str], str]) -> None:
    source = write_checkpoint(tmp_path / "s", edit=renamed(rename))
    out = convert(source, tmp_path / "out", verifier, validate=False)
    assert stored_tensors(out).keys() == source_tensors().keys()


@pytest.mark.parametrize("prefix", ["module.", "ea_layer.", "module.model."])
def test_a_head_may_lie_beside_the_draft(
    tmp_path: Path, verifier: Path, speculators: CommandLine, prefix: str
) -> None:
    def edit(tensors: Tensors) -> None:
        renamed(lambda name: prefix + name)(tensors)
        tensors["lm_head.weight"] = torch.zeros(320, 64)

    source = write_checkpoint(tmp_path / "s", edit=edit)
    assert json.loads(speculators("inspect", source, "--json").stdout)["kind"] == "eagle"
    out = convert(source, tmp_path / "out", verifier, validate=False)
    assert stored_tensors(out).keys() == source_tensors().keys()


def test_two_heads_are_one_too_many(tmp_path: Path, verifier: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.ones(320, 64)
        renamed(lambda name: "module." + name)(tensors)
        tensors["lm_head.weight"] = torch.zeros(320, 64)

    source = write_checkpoint(tmp_path / "s", edit=edit)
    with pytest.raises(ConversionError, match=r"has lm_head\.weight and module\.lm_head\.weight"):
        convert(source, tmp_path / "out", verifier)


def test_inspect_says_what_is_taken_off(tmp_path: Path, speculators: CommandLine) -> None:
    source = write_checkpoint(tmp_path / "s", edit=renamed(lambda name: f"ea_layer.{name}"))
    found = json.loads(speculators("inspect", source, "--json").stdout)
    assert found["kind"] == "eagle"
    assert any("begin with ea_layer." in note for note in found["notes"])
    assert found["conversion"]["possible"]


# Fused matrices


def fused(tensors: Tensors) -> None:
    """As vLLM and SGLang store them: 4 heads, 2 key-value heads, heads of size 16."""
    parts = [tensors.pop(f"layers.0.self_attn.{it}_proj.weight") for it in "qkv"]
    tensors["layers.0.self_attn.qkv_proj.weight"] = torch.cat(parts)
    parts = [tensors.pop(f"layers.0.mlp.{it}_proj.weight") for it in ("gate", "up")]
    tensors["layers.0.mlp.gate_up_proj.weight"] = torch.cat(parts)


def test_fused_matrices_are_split(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "s", edit=fused)
    out = convert(source, tmp_path / "out", verifier)
    expected, found = source_tensors(), stored_tensors(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    made_of = json.loads((out / "conversion.json").read_text())["tensors"]
    assert made_of["layers.0.self_attn.k_proj.weight"] == (
        "layers.0.self_attn.qkv_proj.weight[64:96]"
    )
    assert made_of["layers.0.mlp.up_proj.weight"] == "layers.0.mlp.gate_up_proj.weight[176:352]"
    validate(out, source)


def test_fused_biases_are_split(tmp_path: Path, verifiers: dict[str, Path]) -> None:
    name = "qwen2_qkv_bias"

    def edit(tensors: Tensors) -> None:
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"layers.0.self_attn.{it}_proj.{kind}") for it in "qkv"]
            tensors[f"layers.0.self_attn.qkv_proj.{kind}"] = torch.cat(parts)

    source = write_checkpoint(tmp_path / "s", name=name, edit=edit)
    out = convert(source, tmp_path / "out", verifiers[name])
    expected, found = source_tensors(name), stored_tensors(out)
    assert all(torch.equal(found[it], expected[it]) for it in found)
    assert len(found) == len(expected)


def test_inspect_lists_all_that_a_fused_matrix_becomes(
    tmp_path: Path, speculators: CommandLine
) -> None:
    source = write_checkpoint(tmp_path / "s", edit=fused)
    found = json.loads(speculators("inspect", source, "--json").stdout)
    targets = {tensor["name"]: tensor["target"] for tensor in found["tensors"]}
    assert targets["layers.0.mlp.gate_up_proj.weight"] == (
        "layers.0.mlp.gate_proj.weight, layers.0.mlp.up_proj.weight"
    )


@pytest.mark.parametrize(
    ("edit", "config", "pattern"),
    [
        (fused, {"num_attention_heads": 5}, r"qkv_proj.weight has the shape \(128, 64\)"),
        (
            lambda t: t.update({"layers.0.self_attn.qkv_proj.weight": torch.ones(128, 64)}),
            {},
            r"q_proj.weight and layers.0.self_attn.qkv_proj.weight, which holds it, too",
        ),
    ],
    ids=["heads of another draft", "beside its parts"],
)
def test_fused_matrices_that_do_not_fit(
    tmp_path: Path,
    verifier: Path,
    edit: Callable[[Tensors], None],
    config: dict[str, Any],
    pattern: str,
) -> None:
    source = write_checkpoint(tmp_path / "s", edit=edit, config=config)
    with pytest.raises(ConversionError, match=pattern):
        convert(source, tmp_path / "out", verifier, validate=False)


# Other kinds


def added(**tensors: Tensor) -> Callable[[Tensors], None]:
    return lambda there: there.update({k.replace("__", "."): it for k, it in tensors.items()})


ONE = torch.ones(64)


def griffin(tensors: Tensors) -> None:
    tensors["fc.fc.weight"] = tensors.pop("fc.weight")
    tensors["fc.mlp.up_proj.weight"] = torch.ones(176, 128)


def minicpm(tensors: Tensors) -> None:
    renamed(lambda name: name.replace("layers.0", "model.eagle_layers.0"))(tensors)
    tensors |= {"model.input_norm1.weight": ONE, "model.norm.weight": ONE.clone()}


def llama4(tensors: Tensors) -> None:
    renamed(lambda name: name.replace("mlp", "feed_forward.shared_expert"))(tensors)


def eagle3_without_fc(tensors: Tensors) -> None:
    del tensors["fc.weight"]
    for part, rows in (("q", 64), ("k", 32), ("v", 32)):
        tensors[f"layers.0.self_attn.{part}_proj.weight"] = torch.ones(rows, 128)
    tensors |= {"layers.0.input_layernorm.weight": ONE, "norm.weight": ONE.clone()}


def in_a_model(tensors: Tensors) -> None:
    renamed(lambda name: f"ea_layer.{name}")(tensors)
    for layer in range(2):
        tensors[f"base_model.model.layers.{layer}.self_attn.q_proj.weight"] = torch.ones(64, 64)
    tensors["base_model.lm_head.weight"] = torch.ones(320, 64)


def beside_a_model(tensors: Tensors) -> None:
    tensors["base_model.model.layers.1.mlp.up_proj.weight"] = torch.ones(176, 64)


def only_a_matrix(tensors: Tensors) -> None:
    tensors.clear()
    tensors["weight"] = torch.ones(320, 64)


KINDS: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "two norms": (
        added(layers__0__input_layernorm__weight=ONE, norm__weight=ONE.clone()),
        "eagle-with-norms",
        "an EAGLE-1 draft with a norm before its layer or after it",
    ),
    "a final norm": (added(norm__weight=ONE), "eagle-with-norms", "a norm before its layer or"),
    "norms on queries and keys": (
        added(layers__0__self_attn__q_norm__weight=torch.ones(16)),
        "eagle-qk-norms",
        "with norms on queries and keys",
    ),
    "Llama 4": (llama4, "llama4-eagle", "with a Llama-4 layer"),
    "GRIFFIN": (griffin, "griffin", "a GRIFFIN draft"),
    "MiniCPM": (minicpm, "minicpm-eagle", "an EAGLE draft of MiniCPM"),
    "Mistral": (
        renamed(lambda name: name.replace("fc.", "eagle_linear.")),
        "mistral-eagle",
        "in Mistral's own names",
    ),
    "rows grouped by heads": (
        added(layers__0__attention__wqkv__weight=torch.ones(128, 64)),
        "eagle-grouped-heads",
        "queries, keys and values in one matrix",
    ),
    "EAGLE-3 named EAGLE": (
        eagle3_without_fc,
        "eagle3",
        r"layers.0.self_attn.q_proj.weight \(64, 128\) takes 2 hidden sizes",
    ),
    "a draft in a model": (in_a_model, "draft-in-model", "inside the file of a whole model"),
    "a draft beside a model": (beside_a_model, "draft-in-model", "save the draft's tensors alone"),
    "a matrix": (only_a_matrix, "matrix", "it may be the verifier's head"),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_is_not_converted_is_named(
    tmp_path: Path, verifier: Path, speculators: CommandLine, case: str
) -> None:
    edit, kind, pattern = KINDS[case]
    source = write_checkpoint(tmp_path / "s", edit=edit)
    found = json.loads(speculators("inspect", source, "--json").stdout)
    assert found["kind"] == kind
    with pytest.raises(ConversionError, match=pattern) as refusal:
        convert(source, tmp_path / "out", verifier)
    message = str(refusal.value)
    assert "complete checkpoint" not in message
    assert not re.search(r"(it has|lacks|and|or|of) ?[,;.)]", message), message


def test_advice_fits_what_is_missing_and_what_is_too_much(tmp_path: Path, verifier: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    cases: list[tuple[Callable[[Tensors], object], str]] = [
        (lambda t: t.pop(name), "so give the complete checkpoint"),
        (
            added(layers__0__mlp__extra__weight=ONE),
            "remove what was not trained; else the architecture differs",
        ),
        (
            lambda t: t.update({"layers.0.mlp.extra.weight": t.pop(name)}),
            "a draft with these is a different architecture",
        ),
    ]
    for number, (edit, pattern) in enumerate(cases):
        source = write_checkpoint(tmp_path / f"s{number}", edit=edit)
        with pytest.raises(ConversionError, match=pattern):
            convert(source, tmp_path / "out", verifier)


def test_no_tensors_at_all(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "s", edit=lambda tensors: tensors.clear())
    with pytest.raises(ConversionError, match="has no tensors, which decide what it is"):
        convert(source, tmp_path / "out", verifier)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_hint_of_quantization_does_not_refuse_plain_tensors(
    tmp_path: Path, verifier: Path, log: list[str], key: str
) -> None:
    source = write_checkpoint(tmp_path / "s", config={key: {"quant_method": "awq"}})
    convert(source, tmp_path / "out", verifier)
    told = [line for line in log if line.startswith("WARNING")]
    assert len(told) == 1
    assert f"{key} (awq), but the tensors are not quantized" in told[0]
