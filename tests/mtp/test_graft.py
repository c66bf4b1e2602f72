"""`speculators mtp graft`: one new shard, and everything else as it was."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import CommandLine, Tensors, config_of, entries, stored_tensors
from mtp_verifiers import (
    EXPERTS,
    VERIFIERS,
    bytes_of,
    load_all,
    mtp_of,
    stacked,
    write_verifier,
)
from speculators.errors import CheckpointError, ConversionError, OutputError, SpeculatorsError
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.mtp.cut import cut
from speculators.mtp.graft import graft

INDEX = "model.safetensors.index.json"
PLACE = "mtp.layers.0.mlp.experts"


def body_of(directory: Path) -> Tensors:
    """The tensors of a verifier that are no MTP's."""
    kind = next(
        it
        for it in VERIFIERS
        if VERIFIERS[it].config["model_type"] == config_of(directory)["model_type"]
    )
    shapes = VERIFIERS[kind].body | VERIFIERS[kind].extra  # type: ignore[operator]
    return {name: it for name, it in load_all(directory).items() if name in shapes}


def write_mtp(directory: Path, kind: str = "qwen3_next", **how: Any) -> Path:
    """A directory that holds an MTP, as ``cut`` makes it."""
    donor = write_verifier(directory.parent / f"{directory.name}-donor", kind, **how)
    return cut(donor, directory)


def retrained(kind: str = "qwen3_next") -> Tensors:
    return mtp_of(kind, seed=7)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", VERIFIERS)
@pytest.mark.parametrize("had", [True, False], ids=["retrained", "lost"])
def test_grafted_and_cut_again_it_is_the_same(
    tmp_path: Path, kind: str, shards: int, had: bool
) -> None:
    verifier = write_verifier(
        tmp_path / "verifier", kind, shards=shards, mtp=None if had else {}, spread=True
    )
    mtp = write_mtp(tmp_path / "mtp", kind, mtp=retrained(kind))
    before = load_all(verifier)
    graft(verifier, mtp, tmp_path / "out")
    after = load_all(tmp_path / "out")
    assert bytes_of(after) == bytes_of({**before, **retrained(kind)})
    cut(tmp_path / "out", tmp_path / "again")
    assert bytes_of(stored_tensors(tmp_path / "again")) == bytes_of(retrained(kind))
    assert bytes_of(load_all(verifier)) == bytes_of(before)


def test_shards_are_linked_but_the_one_with_the_old_mtp(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", shards=3)
    (verifier / "figures").mkdir()
    (verifier / "figures" / "one.png").write_bytes(b"png")
    (verifier / ".cache").mkdir()
    mtp = write_mtp(tmp_path / "mtp", mtp=retrained())
    out = graft(verifier, mtp, tmp_path / "out")
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    linked = [(out / name).samefile(verifier / name) for name in names]
    assert linked == [True, True, False]
    assert entries(out) == sorted(
        [
            "config.json",
            "figures",
            "figures/one.png",
            "model-mtp.safetensors",
            INDEX,
            "tokenizer.json",
            *names,
        ]
    )
    # What may be edited is not shared.
    assert not (out / "tokenizer.json").samefile(verifier / "tokenizer.json")
    assert not {name for name in load_file(out / names[2]) if name.startswith("mtp.")}
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(it.nbytes for it in load_all(out).values())
    assert {index["weight_map"][name] for name in retrained()} == {"model-mtp.safetensors"}


def test_on_another_file_system_shards_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    mtp = write_mtp(tmp_path / "mtp")

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = graft(verifier, mtp, tmp_path / "out")
    shard = "model-00001-of-00002.safetensors"
    assert not (out / shard).samefile(verifier / shard)
    assert (out / shard).read_bytes() == (verifier / shard).read_bytes()


def test_a_single_file_gets_an_index(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={}, shards=1)
    out = graft(verifier, write_mtp(tmp_path / "mtp"), tmp_path / "out")
    assert entries(out) == [
        "config.json",
        "model-body.safetensors",
        "model-mtp.safetensors",
        INDEX,
        "tokenizer.json",
    ]
    assert (out / "model-body.safetensors").samefile(verifier / "model.safetensors")


@pytest.mark.parametrize("in_place", [True, False])
def test_an_mtp_that_was_added_beside_a_single_file(tmp_path: Path, in_place: bool) -> None:
    """llm-compressor writes it so; the index then names a model.safetensors."""
    verifier = write_verifier(tmp_path / "verifier", mtp={}, shards=1)
    added, body = mtp_of("qwen3_next"), load_all(verifier)
    save_file(added, verifier / "model_mtp.safetensors")
    files = dict.fromkeys(body, "model.safetensors") | dict.fromkeys(added, "model_mtp.safetensors")
    (verifier / INDEX).write_text(json.dumps({"metadata": {"by": "it"}, "weight_map": files}))
    assert bytes_of(load_all(cut(verifier, tmp_path / "cut"))) == bytes_of(added)
    mtp = write_mtp(tmp_path / "mtp", mtp=retrained())
    out = verifier if in_place else tmp_path / "out"
    graft(verifier, mtp, *([] if in_place else [out]), in_place=in_place)
    assert bytes_of(load_all(out)) == bytes_of(body | retrained())
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["by"] == "it"
    assert {it for it in entries(out) if it.endswith(".safetensors")} == set(
        index["weight_map"].values()
    )


def test_a_verifier_on_this_machine_or_on_the_hub_may_give_it(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    donor = write_verifier(tmp_path / "donor", mtp=retrained())
    out = graft(verifier, donor, tmp_path / "out")
    assert bytes_of(load_all(out)) == bytes_of({**load_all(verifier), **retrained()})


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5"])
def test_config_gets_what_promises_the_mtp(tmp_path: Path, kind: str) -> None:
    mtp = write_mtp(tmp_path / "mtp", kind)
    model = VERIFIERS[kind].config
    changed: dict[str, Any] = {}
    if "text_config" in model:
        without = {k: v for k, v in model["text_config"].items() if k != "mtp_num_hidden_layers"}
        changed = {"text_config": without}
    verifier = write_verifier(tmp_path / "verifier", kind, mtp={}, config=changed)
    config = config_of(graft(verifier, mtp, tmp_path / "out"))
    if "text_config" in config:
        assert config["text_config"].pop("mtp_num_hidden_layers") == 1
    else:
        assert config.pop("num_nextn_predict_layers") == 1
    assert config == config_of(verifier)


# Experts


def test_experts_are_stacked_as_the_verifiers(tmp_path: Path) -> None:
    """PyTorch's stack and cat say what the bytes have to be."""
    verifier = write_verifier(tmp_path / "verifier", mtp={**mtp_of_stacks(3)})
    mtp = write_mtp(tmp_path / "mtp", mtp=retrained())
    out = graft(verifier, mtp, tmp_path / "out")
    assert bytes_of(only_mtp(out)) == bytes_of(mtp_of_stacks(7))


def test_experts_are_taken_apart_as_the_verifiers(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})  # its own layers have single experts
    mtp = write_mtp(tmp_path / "mtp", mtp=mtp_of_stacks(7))
    out = graft(verifier, mtp, tmp_path / "out")
    assert bytes_of(only_mtp(out)) == bytes_of(retrained())


def mtp_of_stacks(seed: int) -> Tensors:
    each = mtp_of("qwen3_next", seed=seed)
    stacks = stacked(each, PLACE)
    return {name: it for name, it in each.items() if ".experts." not in name} | stacks


def only_mtp(directory: Path) -> Tensors:
    return {name: it for name, it in load_all(directory).items() if name.startswith("mtp.")}


def test_transformers_takes_the_stacks_for_the_same_experts(tmp_path: Path) -> None:
    """A layer of Qwen3.5-MoE, saved with single experts, is what our stack says it is."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

    sizes: dict[str, Any] = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": EXPERTS}
    experts = qwen.Qwen3_5MoeExperts(Qwen3_5MoeTextConfig(**sizes, num_experts_per_tok=1))
    tensors = mtp_of("qwen3_next", torch.float32)
    verifier = write_verifier(tmp_path / "verifier", mtp=mtp_of_stacks(3))
    out = graft(verifier, write_mtp(tmp_path / "mtp", mtp=tensors), tmp_path / "out")
    grafted = only_mtp(out)
    with torch.no_grad():
        experts.gate_up_proj.copy_(grafted[f"{PLACE}.gate_up_proj"])
        experts.down_proj.copy_(grafted[f"{PLACE}.down_proj"])
        states = torch.randn(EXPERTS, 16)
        found = experts(states, torch.arange(EXPERTS)[:, None], torch.ones(EXPERTS, 1))
    for expert, state in enumerate(states):
        gate, up, down = (
            tensors[f"{PLACE}.{expert}.{it}_proj.weight"] for it in ("gate", "up", "down")
        )
        expected = down @ (torch.nn.functional.silu(gate @ state) * (up @ state))
        torch.testing.assert_close(found[expert], expected)


def test_quantized_experts_are_not_restacked(tmp_path: Path) -> None:
    quantized = {"quant_method": "fp8"}
    mtp: Tensors = {}
    for name, tensor in mtp_of("qwen3_next").items():
        if ".experts." in name:
            mtp[name] = tensor.to(torch.float8_e4m3fn)
            mtp[f"{name}_scale_inv"] = torch.ones(1, 1)
        else:
            mtp[name] = tensor
    how: dict[str, Any] = {"config": {"quantization_config": quantized}}
    given = write_mtp(tmp_path / "mtp", mtp=mtp, **how)
    verifier = write_verifier(tmp_path / "verifier", mtp=mtp_of_stacks(3), **how)
    with pytest.raises(ConversionError, match="a part of quantized experts"):
        graft(verifier, given, tmp_path / "out")
    fitting = write_verifier(tmp_path / "fitting", mtp={}, **how)
    assert bytes_of(only_mtp(graft(fitting, given, tmp_path / "out"))) == bytes_of(mtp)


# Refusals


def refuse(verifier: Path, mtp: Path, match: str, error: type = SpeculatorsError) -> None:
    """Check that a graft is refused, and that nothing is left of it."""
    before, place = entries(verifier), verifier.parent / "refused"
    with pytest.raises(error, match=match):
        graft(verifier, mtp, place)
    with pytest.raises(error, match=match):
        graft(verifier, mtp, in_place=True)
    assert not place.exists()
    assert entries(verifier) == before
    assert not [it for it in entries(verifier.parent) if "speculators-" in it]


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mtp.fc.weight", torch.bfloat16),
        ("mtp.layers.0.mlp.experts.1.up_proj.weight", torch.float32),
        ("mtp.norm.weight", torch.float16),
        ("mtp.layers.0.self_attn.q_proj.weight", torch.float8_e5m2),
    ],
)
def test_nan_is_refused(tmp_path: Path, name: str, dtype: torch.dtype, value: float) -> None:
    """Upstream notices it neither when it converts nor when it stitches."""
    mtp = retrained()
    mtp[name] = mtp[name].to(dtype)
    mtp[name].view(-1)[-1] = value
    how: dict[str, Any] = {}
    if dtype == torch.float8_e5m2:
        mtp[f"{name}_scale_inv"] = torch.ones(1, 1)
        how = {"config": {"quantization_config": {"quant_method": "fp8"}}}
    verifier = write_verifier(tmp_path / "verifier", mtp={}, **how)
    given = write_mtp(tmp_path / "mtp", mtp=mtp, **how)
    index = [size - 1 for size in mtp[name].shape]
    refuse(verifier, given, rf"{name} has NaN or infinite numbers.*\{index}", CheckpointError)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5", "deepseek_v3", "mimo"])
def test_a_tensor_that_is_missing_is_refused(tmp_path: Path, kind: str) -> None:
    """Upstream stitches 1 of 19 tensors, and says that it is done."""
    given = write_mtp(tmp_path / "mtp", kind)
    tensors = load_file(given / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("v_proj.weight") or "kv_b" in name)
    del tensors[lost]
    save_file(tensors, given / "model.safetensors")
    verifier = write_verifier(tmp_path / "verifier", kind, mtp={})
    refuse(verifier, given, rf"lack.*{lost}")


def test_a_single_tensor_is_refused(tmp_path: Path) -> None:
    given = write_mtp(tmp_path / "mtp")
    tensors = load_file(given / "model.safetensors")
    save_file({"mtp.fc.weight": tensors["mtp.fc.weight"]}, given / "model.safetensors")
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    refuse(verifier, given, r"only a part of its MTP: it lacks mtp\.")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mtp.fc.weight", (16, 16)),
        ("mtp.layers.0.self_attn.q_proj.weight", (16, 16)),
        ("mtp.layers.0.mlp.experts.2.down_proj.weight", (16, 4)),
    ],
)
@pytest.mark.parametrize("had", [True, False])
def test_another_shape_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], had: bool
) -> None:
    given = write_mtp(tmp_path / "mtp", mtp=mtp_of("qwen3_next") | {name: torch.zeros(shape)})
    verifier = write_verifier(tmp_path / "verifier", mtp=None if had else {})
    refuse(verifier, given, rf"{name} of shape \({shape[0]}, {shape[1]}\), and in .* has to be")


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        # Upstream takes a Llama of the same width, and one of another vocabulary.
        ("qwen3_next", {"model_type": "llama"}, "the model type qwen3_next, and .* the type llama"),
        ("qwen3_next", {"vocab_size": 48}, "vocab_size 32, and .* has 48"),
        ("qwen3_next", {"hidden_size": 32}, "hidden_size 16, and .* has 32"),
        ("qwen3_next", {"num_attention_heads": 8}, "num_attention_heads 4"),
        ("qwen3_next", {"num_experts": 4}, "num_experts 3"),
        # Upstream looks for the width at the top level only.
        (
            "qwen3_5",
            {"text_config": {"model_type": "qwen3_5_text", "hidden_size": 32}},
            "hidden_size 16, and .* has 32",
        ),
    ],
)
def test_another_verifiers_mtp_is_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], match: str
) -> None:
    verifier = write_verifier(tmp_path / "verifier", kind, mtp={}, config=config)
    refuse(verifier, write_mtp(tmp_path / "mtp", kind), match, ConversionError)


def test_fewer_layers_are_refused(tmp_path: Path) -> None:
    one = {name: it for name, it in mtp_of("qwen3_5_moe").items() if ".layers.1." not in name}
    text = VERIFIERS["qwen3_5_moe"].config["text_config"] | {"mtp_num_hidden_layers": 1}
    given = write_mtp(tmp_path / "mtp", "qwen3_5_moe", mtp=one, config={"text_config": text})
    verifier = write_verifier(tmp_path / "verifier", "qwen3_5_moe")
    refuse(verifier, given, r"an MTP of 1 layer\(s\), and that of .* has 2", ConversionError)


def test_what_is_no_mtp_is_refused(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    refuse(verifier, write_verifier(tmp_path / "other", mtp={}), "has no MTP")
    refuse(verifier, verifier, "given as the verifier and as the MTP")
    stages = {"mtp.0.main_proj.weight": torch.zeros(2, 2)}
    refuse(verifier, write_verifier(tmp_path / "dspark", mtp=stages), "a stage of DSpark")


def test_a_verifier_that_is_no_directory_of_safetensors(tmp_path: Path) -> None:
    mtp = write_mtp(tmp_path / "mtp")
    with pytest.raises(CheckpointError, match="not a directory on this machine"):
        graft("org/verifier", mtp, tmp_path / "out")
    verifier = write_verifier(tmp_path / "verifier", shards=1)
    torch.save(load_file(verifier / "model.safetensors"), verifier / "pytorch_model.bin")
    (verifier / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"weights in pytorch_model\.bin"):
        graft(verifier, mtp, tmp_path / "out")


def test_exactly_one_of_out_and_in_place(tmp_path: Path, speculators: CommandLine) -> None:
    verifier, mtp = write_verifier(tmp_path / "verifier"), write_mtp(tmp_path / "mtp")
    for arguments in ([], [tmp_path / "out", "--in-place"]):
        run = speculators("mtp", "graft", verifier, mtp, *arguments)
        assert run.status == 2
        assert "exactly one of the two" in " ".join(run.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
    assert speculators("mtp", "graft", verifier, mtp, tmp_path / "out").status == 0


def test_no_output_is_overwritten(tmp_path: Path) -> None:
    verifier, mtp = write_verifier(tmp_path / "verifier"), write_mtp(tmp_path / "mtp")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model-00001-of-00001.safetensors").write_bytes(b"mine")
    before = entries(tmp_path)
    for place, match in (
        (verifier, "is the verifier itself: .* --in-place|is the verifier itself; change it"),
        (mtp, "exists"),
        (foreign, "exists"),
        (verifier / "out", "is within the verifier"),
    ):
        with pytest.raises(OutputError, match=match):
            graft(verifier, mtp, place)
    assert entries(tmp_path) == before


# Quantized verifiers


def test_a_quantized_verifier_excepts_what_is_not_quantized(tmp_path: Path) -> None:
    """As llm-compressor leaves a verifier: the MTP is lost, and everything else is quantized."""
    settings = {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head"],
        "format": "int-quantized",
    }
    verifier = write_verifier(
        tmp_path / "verifier", mtp={}, config={"quantization_config": settings}
    )
    out = graft(verifier, write_mtp(tmp_path / "mtp"), tmp_path / "out")
    found = config_of(out)["quantization_config"]
    assert found["ignore"][:1] == ["lm_head"]
    assert {"mtp.fc", "mtp.layers.0.self_attn.q_proj"} <= set(found["ignore"])
    assert found | {"ignore": 0} == settings | {"ignore": 0}


def quantized_mtp() -> Tensors:
    mtp = retrained()
    name = "mtp.layers.0.self_attn.q_proj.weight"
    mtp[name] = mtp[name].to(torch.float8_e4m3fn)
    mtp[f"{name}_scale_inv"] = torch.ones(1, 1)
    return mtp


def test_a_quantized_mtp_needs_a_verifier_that_is_quantized_alike(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    given = write_mtp(tmp_path / "mtp", mtp=quantized_mtp(), config={"quantization_config": fp8})
    plain = write_verifier(tmp_path / "plain", mtp={})
    refuse(plain, given, "has no quantization_config, so engines would take its numbers")
    other = write_verifier(
        tmp_path / "other",
        mtp={},
        config={"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
    )
    refuse(other, given, r"weight_block_size of its quantization_config is \[64, 64\]")
    alike = write_verifier(
        tmp_path / "alike",
        mtp={},
        config={
            "quantization_config": {
                **fp8,
                "modules_to_not_convert": ["mtp.layers.0.self_attn.q_proj", "lm_head"],
            }
        },
    )
    out = graft(alike, given, tmp_path / "out")
    excepted = config_of(out)["quantization_config"]["modules_to_not_convert"]
    assert "mtp.layers.0.self_attn.q_proj" not in excepted
    assert {"lm_head", "mtp.fc"} <= set(excepted)


@pytest.mark.parametrize(
    "method", ["compressed-tensors", "quark", "fp8", "awq", "gptq", "modelopt"]
)
def test_what_was_listed_for_an_earlier_mtp_is_taken_off(tmp_path: Path, method: str) -> None:
    """A whole MTP is put in the place of a quantized one, and the quantized one put back."""
    how: dict[str, Any] = {"config": {"quantization_config": {"quant_method": method}}}
    quantized: Tensors = {}
    for name, tensor in retrained().items():
        if name.endswith("_proj.weight"):
            quantized[name] = tensor.to(torch.float8_e4m3fn)
            quantized[f"{name}_scale_inv"] = torch.ones(1, 1)
        else:
            quantized[name] = tensor
    given = write_mtp(tmp_path / "quantized", mtp=quantized, **how)
    verifier = write_verifier(tmp_path / "verifier", mtp={}, **how)
    at_once = graft(verifier, given, tmp_path / "at once")
    whole = graft(at_once, write_mtp(tmp_path / "whole"), tmp_path / "with the whole one")
    assert config_of(whole) != config_of(at_once)
    back = graft(whole, given, tmp_path / "back")
    assert config_of(back) == config_of(at_once)
    assert bytes_of(load_all(back)) == bytes_of(load_all(at_once))


def test_an_entry_that_speaks_of_more_is_not_taken_off(tmp_path: Path) -> None:
    settings = {"quant_method": "compressed-tensors", "ignore": ["re:.*q_proj"]}
    how: dict[str, Any] = {"config": {"quantization_config": settings}}
    given = write_mtp(tmp_path / "mtp", mtp=quantized_mtp(), **how)
    refuse(write_verifier(tmp_path / "verifier", mtp={}, **how), given, r"speaks of .*q_proj, too")


def test_other_dtypes_are_kept_and_told(tmp_path: Path, log: list[str]) -> None:
    floats = {name: it.float() for name, it in retrained().items()}
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    out = graft(verifier, write_mtp(tmp_path / "mtp", mtp=floats), tmp_path / "out")
    assert bytes_of(only_mtp(out)) == bytes_of(floats)
    assert any("matrices in F32, the verifier in BF16" in line for line in log)


def test_an_output_within_either_input_is_refused(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    mtp = write_mtp(tmp_path / "mtp")
    for place, what in ((verifier, "the verifier"), (mtp, "the MTP")):
        with pytest.raises(OutputError, match=f"inner is within {what} "):
            graft(verifier, mtp, place / "inner")
        assert not (place / "inner").exists()


# What speculators 0.9 trains


def upstream(directory: Path, tensors: Tensors) -> Path:
    names = {
        "mtp.fc.": "input_proj.",
        "mtp.norm.": "final_layernorm.",
        "mtp.pre_fc_norm_hidden.": "hidden_layernorm.",
        "mtp.pre_fc_norm_embedding.": "token_layernorm.",
        "mtp.layers.0.": "",
    }
    saved = {}
    for name, tensor in tensors.items():
        start = next(it for it in names if name.startswith(it))
        saved["mtp_layers.0." + names[start] + name.removeprefix(start)] = tensor
    saved["verifier_lm_head.weight"] = torch.full((32, 16), float("nan"))
    directory.mkdir()
    save_file(saved, directory / "model.safetensors")
    config = {
        "speculators_model_type": "mtp",
        "num_nextn_predict_layers": 1,
        "transformer_layer_config": VERIFIERS["qwen3_next"].config,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_an_mtp_that_speculators_0_9_trained(tmp_path: Path) -> None:
    """Upstream cannot stitch it into a sharded verifier, and adds its NaN to one of one file."""
    given = upstream(tmp_path / "mtp", mtp_of_stacks(7))
    for shards in (1, 3):
        verifier = write_verifier(tmp_path / f"verifier{shards}", shards=shards)
        out = graft(verifier, given, tmp_path / f"out{shards}")
        assert bytes_of(only_mtp(out)) == bytes_of(retrained())
        assert "verifier_lm_head.weight" not in load_all(out)
    with pytest.raises(CheckpointError, match="graft it into its verifier, and cut it out of that"):
        cut(given, tmp_path / "cut")


# In place


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("had", [True, False], ids=["retrained", "lost"])
def test_in_place(tmp_path: Path, shards: int, had: bool) -> None:
    verifier = write_verifier(tmp_path / "verifier", shards=shards, mtp=None if had else {})
    before = load_all(verifier)
    mtp = write_mtp(tmp_path / "mtp", mtp=retrained())
    graft(verifier, mtp, in_place=True)
    assert bytes_of(load_all(verifier)) == bytes_of({**before, **retrained()})
    named = set(json.loads((verifier / INDEX).read_text())["weight_map"].values())
    assert {it for it in entries(verifier) if it.endswith(".safetensors")} == named
    assert set(entries(verifier)) - named == {"config.json", INDEX, "tokenizer.json"}
    # A second time, the shard of the first is replaced.
    graft(verifier, write_mtp(tmp_path / "second", mtp=mtp_of("qwen3_next", seed=8)), in_place=True)
    assert bytes_of(only_mtp(verifier)) == bytes_of(mtp_of("qwen3_next", seed=8))
    named = set(json.loads((verifier / INDEX).read_text())["weight_map"].values())
    assert {it for it in entries(verifier) if it.endswith(".safetensors")} == named


def test_a_hub_cache_is_not_changed_in_place(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    repository = tmp_path / "models--org--verifier"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(verifier.iterdir())):
        blob = repository / "blobs" / f"{number:064}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    before = entries(repository)
    mtp = write_mtp(tmp_path / "mtp")
    with pytest.raises(OutputError, match="a snapshot in a cache of the Hub's client"):
        graft(snapshot, mtp, in_place=True)
    assert entries(repository) == before
    out = graft(snapshot, mtp, tmp_path / "out")  # what is linked is the blob
    assert not any(path.is_symlink() for path in out.iterdir())
    assert bytes_of(load_all(out)) == bytes_of({**load_all(verifier), **mtp_of("qwen3_next")})


def test_a_link_is_not_replaced_in_place(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    (verifier / "config.json").rename(tmp_path / "shared.json")
    (verifier / "config.json").symlink_to(tmp_path / "shared.json")
    with pytest.raises(OutputError, match=r"made of links \(config\.json"):
        graft(verifier, write_mtp(tmp_path / "mtp"), in_place=True)


AUDITED = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


def stopped(at: int, verifier: Path, mtp: Path) -> int:
    """Graft in place in a process that ends at once before its ``at``-th change; its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    import sys

    left = at

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in AUDITED and str(verifier) in str(arguments[0]):
            left -= 1
            if left == 0:
                os._exit(9)

    sys.addaudithook(audit)
    try:
        graft(verifier, mtp, in_place=True)
    finally:
        os._exit(0)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_that_is_killed_leaves_a_verifier_that_loads(tmp_path: Path, shards: int) -> None:
    original = write_verifier(tmp_path / "original", shards=shards)
    mtp = write_mtp(tmp_path / "mtp", mtp=retrained())
    old = bytes_of(load_all(original))
    new = bytes_of({**load_all(original), **retrained()})
    status, moment, seen = 9, 0, set()
    while status:
        moment += 1
        verifier = tmp_path / "verifier"
        shutil.copytree(original, verifier)
        status = stopped(moment, verifier, mtp)
        found = bytes_of(load_all(verifier))
        assert found in (old, new), f"at moment {moment}"
        seen.add(found == new)
        if not status:
            break
        # The next run completes, and clears up.
        graft(verifier, mtp, in_place=True)
        assert bytes_of(load_all(verifier)) == new
        named = set(json.loads((verifier / INDEX).read_text())["weight_map"].values())
        assert set(entries(verifier)) == named | {"config.json", INDEX, "tokenizer.json"}
        shutil.rmtree(verifier)
    assert moment > 8
    assert seen == {False, True}


def test_a_killed_run_that_changes_the_quantization_is_told_and_undone(tmp_path: Path) -> None:
    """config.json and the index cannot be replaced in one step, so in between it is told."""
    fp8 = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    how: dict[str, Any] = {"config": {"quantization_config": fp8}}
    original = write_verifier(tmp_path / "original", mtp=quantized_mtp(), **how)
    mtp = write_mtp(tmp_path / "mtp", mtp=retrained(), **how)

    def state(directory: Path) -> tuple[Any, Any]:
        return config_of(directory), bytes_of(load_all(directory))

    old, new = state(original), state(graft(original, mtp, tmp_path / "grafted"))
    assert old[0] != new[0]
    refused = write_mtp(tmp_path / "refused", mtp=retrained() | {"mtp.fc.weight": torch.zeros(1)})
    verifier = tmp_path / "verifier"
    status, moment, told = 9, 0, 0
    while status:
        moment += 1
        shutil.copytree(original, verifier)
        status = stopped(moment, verifier, mtp)
        notes = [it for it in inspect_checkpoint(verifier).notes if "was stopped" in it]
        if state(verifier) not in (old, new):
            (note,) = notes
            assert "its config.json may not fit its weights; repeat" in note
            told += 1
            stopped_halfway = "repeat `speculators mtp graft --in-place`"
            with pytest.raises(CheckpointError, match=stopped_halfway):
                cut(verifier, tmp_path / "cut")
            for one, other in ((verifier, mtp), (tmp_path / "grafted", verifier)):
                with pytest.raises(CheckpointError, match=stopped_halfway):
                    graft(one, other, tmp_path / "out")
            # Even one that is refused puts right what the last one left.
            with pytest.raises(ConversionError, match="has to be"):
                graft(verifier, refused, in_place=True)
            assert state(verifier) == old
        else:
            assert not notes
        graft(verifier, mtp, in_place=True)
        assert state(verifier) == new
        assert not [it for it in entries(verifier) if it.startswith(".")]
        shutil.rmtree(verifier)
    assert told


def test_what_another_run_is_moving_in_is_not_cleared_up(tmp_path: Path) -> None:
    from speculators.mtp.journal import JOURNAL

    verifier = write_verifier(tmp_path / "verifier", mtp={})
    mtp = write_mtp(tmp_path / "mtp")
    (verifier / "mine.safetensors").write_bytes(b"")
    (verifier / JOURNAL).write_text('{"new": ["model-mtp.safetensors"]}')
    before = entries(verifier)
    with (verifier / JOURNAL).open() as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match=r"Another graft is changing .*; wait for it"):
            graft(verifier, mtp, in_place=True)
    assert entries(verifier) == before
    graft(verifier, mtp, in_place=True)
    assert (verifier / "mine.safetensors").exists()
    assert not (verifier / JOURNAL).exists()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speculators.mtp import receiver

    verifier = write_verifier(tmp_path / "verifier", mtp={})
    before = {it: (verifier / it).read_bytes() for it in entries(verifier)}
    mtp = write_mtp(tmp_path / "mtp")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(receiver, "sync_directory", interrupt)  # all but the index is in its place
    with pytest.raises(KeyboardInterrupt):
        graft(verifier, mtp, in_place=True)
    assert {it: (verifier / it).read_bytes() for it in entries(verifier)} == before


def test_once_the_index_is_there_nothing_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = write_verifier(tmp_path / "verifier", shards=1)
    before = load_all(verifier)
    mtp = write_mtp(tmp_path / "mtp", mtp=retrained())
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        done = replace(path, target)
        if target.name == INDEX:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graft(verifier, mtp, in_place=True)
    monkeypatch.undo()
    assert bytes_of(load_all(verifier)) == bytes_of({**before, **retrained()})
