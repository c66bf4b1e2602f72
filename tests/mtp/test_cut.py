"""`speculators mtp cut`: exactly the MTP, byte for byte, with what engines need to load it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import CommandLine, Tensors, config_of, entries, stored_tensors
from mtp_verifiers import GOLDEN_MTP, VERIFIERS, bytes_of, load_all, mtp_of, write_verifier
from speculators.errors import CheckpointError, OutputError, SpeculatorsError
from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.mtp.cut import cut

CUT = ["config.json", "model.safetensors"]


def scales_of(tensors: Tensors) -> Tensors:
    """Tensors with their matrices in FP8, as DeepSeek's and Qwen's FP8 checkpoints have them."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and "fc" not in name and "gate.weight" not in name:
            found[name] = tensor.to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = torch.ones(1, 1)
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", VERIFIERS)
def test_exactly_the_mtp_is_cut(tmp_path: Path, kind: str, shards: int) -> None:
    verifier = write_verifier(tmp_path / "verifier", kind, shards=shards, spread=True)
    cut(verifier, tmp_path / "out")
    assert entries(tmp_path / "out") == CUT
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(mtp_of(kind))
    assert inspect_checkpoint(tmp_path / "out").kind.startswith("mtp")


@pytest.mark.parametrize("kind", VERIFIERS)
def test_config_says_how_many_layers_there_are(tmp_path: Path, kind: str) -> None:
    before = config_of(write_verifier(tmp_path / "verifier", kind))
    after = config_of(cut(tmp_path / "verifier", tmp_path / "out"))
    model = before.get("text_config", before)
    promised = {"mtp_num_hidden_layers", "num_nextn_predict_layers"} & model.keys()
    if promised:
        assert after == before
    else:  # Qwen3-Next and MiMo-V2 as they are published
        assert after == before | {"num_nextn_predict_layers": 1}


def test_the_golden_mtp(tmp_path: Path, speculators: CommandLine) -> None:
    run = speculators("mtp", "cut", GOLDEN_MTP, tmp_path / "out")
    assert run.status == 0
    assert "29 tensors" in run.messages[-1]
    theirs = {
        name: tensor
        for name, tensor in load_file(GOLDEN_MTP / "model.safetensors").items()
        if name.startswith("mtp.")
    }
    assert len(theirs) == 29
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(theirs)


def test_dtypes_are_kept_and_every_run_gives_the_same(tmp_path: Path) -> None:
    """Upstream casts all tensors to a dtype that it takes from a set."""
    mtp = {
        name: tensor.float() if "norm" in name else tensor
        for name, tensor in mtp_of("qwen3_next").items()
    }
    mtp["mtp.fc.weight"][0, 0] = -0.0
    verifier = write_verifier(tmp_path / "verifier", mtp=mtp)
    first, second = (cut(verifier, tmp_path / it) / "model.safetensors" for it in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert bytes_of(load_file(first)) == bytes_of(mtp)


def test_weights_in_a_pickle_are_cut_too(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", shards=1)
    torch.save(load_file(verifier / "model.safetensors"), verifier / "pytorch_model.bin")
    (verifier / "model.safetensors").unlink()
    cut(verifier, tmp_path / "out")
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(mtp_of("qwen3_next"))


@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v3"])
def test_fp8_goes_with_its_scales(tmp_path: Path, kind: str) -> None:
    """Upstream refuses FP8 with scales, and without them casts the norms to FP8."""
    mtp = scales_of(mtp_of(kind))
    quantized = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }
    verifier = write_verifier(
        tmp_path / "verifier", kind, mtp=mtp, config={"quantization_config": quantized}
    )
    cut(verifier, tmp_path / "out")
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(mtp)
    found = config_of(tmp_path / "out")["quantization_config"]
    not_quantized = {
        "qwen3_next": "mtp.layers.0.mlp.gate",
        "deepseek_v3": "model.layers.2.mlp.gate",
    }
    entries_added = set(found["modules_to_not_convert"]) - set(quantized["modules_to_not_convert"])
    assert not_quantized[kind] in entries_added
    assert not any("q_proj" in it or "q_a_proj" in it for it in entries_added)
    assert found | {"modules_to_not_convert": 0} == quantized | {"modules_to_not_convert": 0}


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    mtp = scales_of(mtp_of("qwen3_next"))
    del mtp["mtp.layers.0.self_attn.q_proj.weight_scale_inv"]
    verifier = write_verifier(tmp_path / "verifier", mtp=mtp)
    with pytest.raises(
        CheckpointError, match=r"lacks mtp\.layers\.0\.self_attn\.q_proj\.weight_sc"
    ):
        cut(verifier, tmp_path / "out")
    assert entries(tmp_path) == entries_below(verifier)


def entries_below(directory: Path) -> list[str]:
    return [directory.name, *(f"{directory.name}/{it}" for it in entries(directory))]


METHODS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "ignore": ["lm_head", "mtp.fc"]},
        "ignore",
        [
            "lm_head",
            "mtp.fc",
            "mtp.layers.0.self_attn.q_proj",
            r"re:^mtp\.layers\.0\.mlp\.experts\..*",
        ],
    ),
    "by a pattern": (
        {"quant_method": "compressed-tensors", "ignore": ["re:^mtp.*"]},
        "ignore",
        ["re:^mtp.*"],
    ),
    "fp8": (
        {"quant_method": "fp8"},
        "modules_to_not_convert",
        ["mtp.fc", "mtp.layers.0.mlp.experts"],
    ),
    "awq": (
        {"quant_method": "awq", "modules_to_not_convert": ["mtp"]},
        "modules_to_not_convert",
        ["mtp"],
    ),
    "modelopt": ({"quant_method": "modelopt", "ignore": ["mtp*"]}, "ignore", ["mtp*"]),
    "one that is no list": (
        {"quant_method": "compressed-tensors", "ignore": "lm_head"},
        "ignore",
        ["lm_head", "mtp.fc"],
    ),
    "an older key": (
        {"quant_method": "fp8", "ignored_layers": ["lm_head"]},
        "ignored_layers",
        ["lm_head", "mtp.fc"],
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_mtp_that_is_not_quantized_is_excepted(tmp_path: Path, name: str) -> None:
    settings, key, expected = METHODS[name]
    verifier = write_verifier(tmp_path / "verifier", config={"quantization_config": settings})
    found = config_of(cut(verifier, tmp_path / "out"))["quantization_config"][key]
    assert set(expected) <= set(found)
    if len(expected) == 1:  # it covers the MTP already
        assert found == expected


def test_gptq_excepts_by_patterns(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*0.*": {"bits": 8}}}
    verifier = write_verifier(tmp_path / "verifier", config={"quantization_config": settings})
    found = config_of(cut(verifier, tmp_path / "out"))["quantization_config"]["dynamic"]
    # The first that matches counts; qkv_proj, which vLLM asks for, has to match too.
    assert list(found.items()) == [(r"-:^mtp\..*", {}), ("+:.*0.*", {"bits": 8})]


def test_modelopt_says_it_in_its_own_file(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier")
    said = {"producer": {}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (verifier / "hf_quant_config.json").write_text(json.dumps(said))
    cut(verifier, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert {"lm_head", "mtp.fc"} <= set(found["quantization"]["exclude_modules"])


def test_an_unknown_way_to_quantize_is_told(tmp_path: Path) -> None:
    verifier = write_verifier(
        tmp_path / "verifier", config={"quantization_config": {"quant_method": "new"}}
    )
    with pytest.raises(SpeculatorsError, match=r"quant_method new, .* mtp\.fc"):
        cut(verifier, tmp_path / "out")
    assert not (tmp_path / "out").exists()


LOST = {
    "qwen3_next": ["mtp.fc.weight", "mtp.layers.0.self_attn.k_proj.weight"],
    "qwen3_5": ["mtp.norm.weight", "mtp.layers.0.mlp.up_proj.weight"],
    "qwen3_5_moe": ["mtp.layers.1.mlp.experts.down_proj"],
    "deepseek_v3": ["model.layers.2.enorm.weight", "model.layers.2.mlp.experts.1.up_proj.weight"],
    "mimo": ["model.mtp_layers.0.input_proj.weight", "model.mtp_layers.0.self_attn.o_proj.weight"],
    "ernie4_5_moe": ["model.mtp_emb_norm.0.weight", "model.mtp_block.0.mlp.up_proj.weight"],
}


@pytest.mark.parametrize("kind", LOST)
def test_a_lost_tensor_is_named(tmp_path: Path, kind: str) -> None:
    for number, lost in enumerate(LOST[kind]):
        mtp = mtp_of(kind)
        del mtp[lost]
        verifier = write_verifier(tmp_path / str(number), kind, mtp=mtp)
        with pytest.raises(CheckpointError, match="only a part of its MTP: it lacks") as error:
            cut(verifier, tmp_path / "out")
        stem = lost.removesuffix(".weight").rpartition(".")[2]
        assert stem in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_lost_layer_is_named(tmp_path: Path) -> None:
    mtp = {name: it for name, it in mtp_of("qwen3_5_moe").items() if ".layers.1." not in name}
    verifier = write_verifier(tmp_path / "verifier", "qwen3_5_moe", mtp=mtp)
    with pytest.raises(CheckpointError, match=r"it lacks mtp\.layers\.1\.input_layernorm\.weight"):
        cut(verifier, tmp_path / "out")


def test_an_mtp_that_is_only_promised(tmp_path: Path, speculators: CommandLine) -> None:
    verifier = write_verifier(tmp_path / "verifier", "deepseek_v3", mtp={})
    run = speculators("mtp", "cut", verifier, tmp_path / "out")
    assert run.status == 1
    (error,) = run.errors
    assert error == (
        f"{verifier} has lost its MTP: config.json promises 1 layer(s) (num_nextn_predict_layers), "
        "but no tensor is named like one of the MTP of DeepSeek's type; take it from a checkpoint "
        "that has it."
    )


def test_a_file_beside_the_index_may_hold_it(tmp_path: Path) -> None:
    """As in some NVFP4 checkpoints of GLM: no engine but SGLang looks there."""
    donor = cut(write_verifier(tmp_path / "donor", "glm4v_moe"), tmp_path / "one")
    verifier = write_verifier(tmp_path / "verifier", "glm4v_moe", mtp={})
    (donor / "model.safetensors").rename(verifier / "mtp.safetensors")
    with pytest.raises(CheckpointError, match=r"but mtp\.safetensors may hold them: give that"):
        cut(verifier, tmp_path / "out")
    cut(verifier / "mtp.safetensors", tmp_path / "out")
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(mtp_of("glm4v_moe"))


def test_a_verifier_without_an_mtp(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", mtp={})
    with pytest.raises(CheckpointError, match=r"has no MTP: no tensor is named like one"):
        cut(verifier, tmp_path / "out")


@pytest.mark.parametrize("name", ["main_proj.weight", "markov_head.markov_w1.weight"])
def test_dspark_below_mtp_is_not_taken_for_one(tmp_path: Path, name: str) -> None:
    stages = {f"mtp.0.{name}": torch.zeros(2, 2), "mtp.0.attn.wq_a.weight": torch.zeros(2, 2)}
    for kind in ("deepseek_v4", "qwen3_next"):
        verifier = write_verifier(tmp_path / kind, kind, mtp=stages)
        with pytest.raises(
            CheckpointError, match=r"a stage of DSpark, not of an MTP; vLLM serves it"
        ):
            cut(verifier, tmp_path / "out")


def test_a_type_that_is_known_by_name_only(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", config={"model_type": "minimax_m3"})
    with pytest.raises(CheckpointError, match=r"tensors of the MTP of MiniMax-M3 are not known"):
        cut(verifier, tmp_path / "out")


@pytest.mark.parametrize("kind", ["qwen3_5", "deepseek_v3"])
def test_a_new_model_type_is_known_by_its_tensors(tmp_path: Path, kind: str) -> None:
    config: dict[str, Any] = {"model_type": "brand_new"}
    if kind == "qwen3_5":
        config["text_config"] = VERIFIERS[kind].config["text_config"] | {"model_type": "brand_new"}
    verifier = write_verifier(tmp_path / "verifier", kind, config=config)
    cut(verifier, tmp_path / "out")
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(mtp_of(kind))


def test_sglangs_older_layout_has_its_layer_at_0(tmp_path: Path) -> None:
    mtp = {name.replace("layers.2.", "layers.0."): it for name, it in mtp_of("deepseek_v3").items()}
    verifier = write_verifier(
        tmp_path / "verifier",
        "deepseek_v3",
        mtp={},
        config={"num_hidden_layers": 1},
    )
    only = tmp_path / "only"
    only.mkdir()
    (verifier / "config.json").rename(only / "config.json")
    torch.save(mtp, only / "pytorch_model.bin")
    cut(only, tmp_path / "out")
    assert bytes_of(stored_tensors(tmp_path / "out")) == bytes_of(mtp)


def test_nothing_that_exists_is_touched(tmp_path: Path) -> None:
    """Upstream deletes the verifier's shards if it is asked to write beside them."""
    verifier = write_verifier(tmp_path / "verifier", shards=3)
    before = load_all(verifier)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model-00001-of-00002.safetensors").write_bytes(b"mine")
    for place in (verifier, foreign, verifier / "model-00001-of-00003.safetensors"):
        with pytest.raises(OutputError):
            cut(verifier, place)
    assert bytes_of(load_all(verifier)) == bytes_of(before)
    assert entries(foreign) == ["model-00001-of-00002.safetensors"]
    assert entries(tmp_path) == sorted([*entries_below(verifier), *entries_below(foreign)])


def test_one_shard_of_several(tmp_path: Path) -> None:
    verifier = write_verifier(tmp_path / "verifier", "qwen3_5", shards=2)
    with pytest.raises(CheckpointError, match=r"no tensor is named .* give the directory\.$"):
        cut(verifier / "model-00001-of-00002.safetensors", tmp_path / "out")


def test_an_output_within_the_input_is_refused(tmp_path: Path, speculators: CommandLine) -> None:
    verifier = write_verifier(tmp_path / "verifier", shards=1)
    for given in (verifier, verifier / "model.safetensors"):
        run = speculators("mtp", "cut", given, verifier / "inner")
        (error,) = run.errors
        assert error == (
            f"{verifier / 'inner'} is within the verifier {verifier}; choose another output."
        )
    assert not (verifier / "inner").exists()
