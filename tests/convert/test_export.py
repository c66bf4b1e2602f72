"""Export: what other software reads, with the tensors byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import (
    GOLDEN_NAMES,
    HIDDEN,
    PLAIN,
    CommandLine,
    Tensors,
    config_of,
    entries,
    source_config,
    source_tensors,
    stored_tensors,
    write_checkpoint,
)
from speculators.convert.eagle import EagleConverter
from speculators.convert.export import export, plan_export
from speculators.errors import ConversionError, FormatError, OutputError
from speculators.families.converted import open_converted
from speculators.families.eagle import TARGETS
from speculators.families.readers import READERS
from speculators.families.registry import families
from speculators.inspection.checkpoint import inspect_checkpoint

BIASED, QWEN, NORMS = "vicuna_default_bias", "qwen2_qkv_bias", "ttt_layernorms"


def assert_same_bytes(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        as_bytes = [it.contiguous().view(torch.uint8) for it in (found[name], tensor)]
        assert torch.equal(*as_bytes), name


def convert(source: Path, output: Path, verifier: Path) -> Path:
    return EagleConverter().convert(source, output, verifier, validate=False)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_research_layout_has_the_tensors_of_the_original(
    tmp_path: Path, converted: dict[str, Path], name: str
) -> None:
    assert export(converted[name], tmp_path / "out", "eagle") == tmp_path / "out"
    assert entries(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert_same_bytes(stored_tensors(tmp_path / "out"), source_tensors(name))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_research_layout_has_the_config_of_the_original(
    tmp_path: Path, converted: dict[str, Path], name: str
) -> None:
    """Compare every key of the original, except those that only transformers writes."""
    export(converted[name], tmp_path / "out", "eagle")
    original, found = source_config(name), config_of(tmp_path / "out")
    for key in original.keys() - {"transformers_version", "use_cache"}:
        if key == "rope_scaling":
            assert original[key].items() <= found[key].items()
        elif key == "rope_theta" and "rope_scaling" in original:
            assert found[key] == 10000  # which the reference uses then
        else:
            assert found[key] == original[key], key


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_there_and_back_again_is_the_identity(
    tmp_path: Path, converted: dict[str, Path], verifiers: dict[str, Path], name: str
) -> None:
    export(converted[name], tmp_path / "out", "eagle")
    again = EagleConverter().convert(tmp_path / "out", tmp_path / "again", verifiers[name])
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (converted[name] / file).read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token_id": [2, 7]},
        {"bos_token_id": 5, "pad_token_id": None, "hidden_act": "gelu"},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
    ids=["several-eos", "no-pad", "dynamic"],
)
def test_there_and_back_again_with_other_configs(
    tmp_path: Path, verifier: Path, config: dict[str, Any]
) -> None:
    source = write_checkpoint(tmp_path / "source", config=config)
    once = convert(source, tmp_path / "once", verifier)
    export(once, tmp_path / "out", "eagle")
    twice = convert(tmp_path / "out", tmp_path / "twice", verifier)
    assert config_of(twice) == config_of(once)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "base", "expected"),
    [
        # cnets1.py knows linear and dynamic scaling only, and reads rope_scaling["type"].
        ({"rope_scaling": LLAMA3}, 10000.0, "has llama3 RoPE scaling with the base 10000"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            10000.0,
            "has yarn RoPE scaling with .* 10000",
        ),
        # With these, it takes the base 10000 whatever config.json says.
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            500000.0,
            "has linear RoPE scaling with the base 500000",
        ),
    ],
    ids=["llama3", "yarn", "base"],
)
def test_what_the_reference_cannot_compute_is_refused(
    tmp_path: Path, verifier: Path, config: dict[str, Any], base: float, expected: str
) -> None:
    draft = convert(write_checkpoint(tmp_path / "source", config=config), tmp_path / "a", verifier)
    written = config_of(draft)
    written["transformer_layer_config"]["rope_theta"] = base
    (draft / "config.json").write_text(json.dumps(written))
    refuse_for_research(draft, tmp_path / "out", expected)
    export(draft, tmp_path / "vllm", "vllm")


def test_heads_of_another_size_are_refused(tmp_path: Path, verifier: Path) -> None:
    """The reference divides the hidden size by the number of heads, whatever config.json says."""

    def widen(tensors: Tensors) -> None:
        for name, dim in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
            key = f"layers.0.self_attn.{name}_proj.weight"
            tensors[key] = torch.cat([tensors[key]] * 2, dim=dim)

    source = write_checkpoint(tmp_path / "source", edit=widen)
    draft = convert(source, tmp_path / "draft", verifier)
    refuse_for_research(draft, tmp_path / "out", "has heads of size 32")


def refuse_for_research(draft: Path, output: Path, expected: str) -> None:
    """Check that a draft is not exported for the research code, and that `inspect` says so."""
    with pytest.raises(ConversionError, match=f"{expected}, which the EAGLE and HASS research co"):
        export(draft, output, "eagle")
    exports = inspect_checkpoint(draft).exports
    assert exports is not None
    assert "eagle" not in exports
    assert "vllm" in exports


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_stays(tmp_path: Path, verifier: Path, dtype: torch.dtype) -> None:
    def cast(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    source = write_checkpoint(tmp_path / "source", edit=cast)
    export(convert(source, tmp_path / "converted", verifier), tmp_path / "out", "sglang")
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "out").values()} == {dtype}
    assert config_of(tmp_path / "out")["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", [PLAIN, "rope_linear"])
def test_plain_drafts_go_to_vllm(tmp_path: Path, converted: dict[str, Path], name: str) -> None:
    export(converted[name], tmp_path / "out", "vllm")
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["bias"] is False
    assert_same_bytes(stored_tensors(tmp_path / "out"), source_tensors(name))


@pytest.mark.parametrize(
    ("name", "target", "feature"),
    [
        (BIASED, "vllm", "a bias on fc, which vLLM without the plugin cannot compute"),
        (QWEN, "vllm", "a bias on fc, which vLLM without the plugin cannot compute"),
        (NORMS, "vllm", "extra layernorms, which vLLM without the plugin cannot compute"),
        (NORMS, "sglang", "extra layernorms, which SGLang cannot compute"),
    ],
)
def test_a_feature_that_the_target_lacks_is_named(
    tmp_path: Path, converted: dict[str, Path], name: str, target: str, feature: str
) -> None:
    with pytest.raises(ConversionError, match=feature):
        export(converted[name], tmp_path / "out", target)
    assert entries(tmp_path) == []


def test_two_features_that_the_target_lacks_are_both_named(tmp_path: Path, verifiers: Any) -> None:
    bias = {"fc.bias": torch.ones(HIDDEN)}
    source = write_checkpoint(tmp_path / "source", name=NORMS, edit=lambda it: it.update(bias))
    converted = convert(source, tmp_path / "converted", verifiers[NORMS])
    with pytest.raises(ConversionError, match="a bias on fc and extra layernorms, which vLLM"):
        export(converted, tmp_path / "out", "vllm")


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_engines_know_one_activation(tmp_path: Path, verifier: Path, target: str) -> None:
    source = write_checkpoint(tmp_path / "source", config={"hidden_act": "gelu"})
    converted = convert(source, tmp_path / "converted", verifier)
    with pytest.raises(ConversionError, match=r"an activation other than silu \(gelu\), which"):
        export(converted, tmp_path / "out", target)


def test_attention_biases_alone_go_to_vllm(tmp_path: Path, verifiers: dict[str, Path]) -> None:
    source = write_checkpoint(
        tmp_path / "source", name=QWEN, edit=lambda tensors: tensors.pop("fc.bias")
    )
    export(convert(source, tmp_path / "converted", verifiers[QWEN]), tmp_path / "out", "vllm")
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["qkv_bias"], config["bias"]) == ("llama", True, False)
    assert_same_bytes(stored_tensors(tmp_path / "out"), stored_tensors(source))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (PLAIN, "LlamaForCausalLMEagle"),
        (BIASED, "LlamaForCausalLMEagle"),
        (QWEN, "Qwen2ForCausalLMEagle"),
    ],
)
def test_sglang_gets_a_bias_on_fc_in_any_case(
    tmp_path: Path, converted: dict[str, Path], name: str, architecture: str
) -> None:
    export(converted[name], tmp_path / "out", "sglang")
    config = config_of(tmp_path / "out")
    assert config["architectures"] == [architecture]
    assert config["bias"] is False  # to SGLang it means biases on q, k, v and o
    expected = source_tensors(name)
    expected.setdefault("fc.bias", torch.zeros(HIDDEN))
    assert_same_bytes(stored_tensors(tmp_path / "out"), expected)


def test_sglang_s_way_with_embeddings_is_told(
    tmp_path: Path, verifier: Path, converted: dict[str, Path], log: list[str]
) -> None:
    remark = "SGLang uses the verifier's embedding, whatever the draft's own holds"
    export(converted[PLAIN], tmp_path / "one", "sglang")
    assert f"WARNING {converted[PLAIN]}: {remark}" in log
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.pop("embed_tokens.weight")
    )
    without = convert(source, tmp_path / "without", verifier)
    log.clear()
    export(without, tmp_path / "two", "sglang")
    assert not any(remark in line for line in log)


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        (None, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 8192),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            2048,
        ),
    ],
)
def test_the_context_that_sglang_may_serve_is_told(
    tmp_path: Path,
    verifier: Path,
    log: list[str],
    scaling: dict[str, Any] | None,
    tokens: int,
) -> None:
    """As SGLang 0.5.23 derives it from the exported config."""
    keys = {"max_position_embeddings": 2048, "rope_scaling": scaling, "rope_theta": 10000.0}
    source = write_checkpoint(tmp_path / "source", config=keys)
    out = convert(source, tmp_path / "out", verifier)
    export(out, tmp_path / "exported", "sglang")
    assert any(f"give it --context-length {tokens}, or set SGLANG_" in line for line in log)


def test_the_compile_cache_of_vllm_is_told(
    tmp_path: Path, converted: dict[str, Path], log: list[str]
) -> None:
    export(converted[PLAIN], tmp_path / "out", "vllm")
    assert any("give every draft a VLLM_CACHE_ROOT of its own" in line for line in log)


def test_an_older_layout_is_exported_under_today_s_names(
    tmp_path: Path, converted: dict[str, Path]
) -> None:
    older = {
        "fc.weight": "fusion_fc.weight",
        "post_embedding_layernorm.weight": "embedding_layernorm.weight",
        "hidden_layernorm.weight": "transformer.input_layernorm.weight",
    }
    directory = tmp_path / "older"
    directory.mkdir()
    (directory / "config.json").write_bytes((converted[NORMS] / "config.json").read_bytes())
    tensors = {
        older.get(name, name.replace("layers.0.", "transformer.")): tensor
        for name, tensor in stored_tensors(converted[NORMS]).items()
    }
    save_file(tensors, directory / "model.safetensors")
    export(directory, tmp_path / "out", "eagle")
    assert_same_bytes(stored_tensors(tmp_path / "out"), source_tensors(NORMS))


def test_a_checkpoint_that_was_not_converted_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    with pytest.raises(FormatError, match="Convert the checkpoint first"):
        export(source, tmp_path / "out", "eagle")
    assert entries(tmp_path) == sorted(["source", *(f"source/{it}" for it in entries(source))])


@pytest.mark.parametrize("obstacle", ["full", "file"])
def test_nothing_is_written_over(tmp_path: Path, converted: dict[str, Path], obstacle: str) -> None:
    output = tmp_path / "out"
    if obstacle == "full":
        output.mkdir()
        (output / "mine").write_text("mine")
    else:
        output.write_text("mine")
    before = entries(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="choose another output"):
            export(converted[PLAIN], output, "eagle", overwrite=overwrite)
    assert entries(tmp_path) == before


def test_only_an_export_is_replaced(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    """Never a trained draft, which has the same files, nor what the export is made of."""
    output = export(converted[PLAIN], tmp_path / "out", "eagle")
    run = speculators("export", converted[PLAIN], output, "--to", "sglang")
    assert run.status == 1
    assert run.errors[0].endswith("or replace it with --overwrite.")
    run = speculators("export", converted[PLAIN], output, "--to", "sglang", "--overwrite")
    assert run.status == 0
    assert config_of(output)["architectures"] == ["LlamaForCausalLMEagle"]

    trained = write_checkpoint(tmp_path / "trained")
    for kept in (trained, converted[PLAIN]):
        before = (kept / "model.safetensors").read_bytes()
        run = speculators("export", converted[PLAIN], kept, "--to", "eagle", "--overwrite")
        assert run.status == 1
        assert "is not an export that speculators wrote" in run.errors[0]
        assert (kept / "model.safetensors").read_bytes() == before


def test_a_plan_writes_nothing(converted: dict[str, Path]) -> None:
    draft = open_converted(converted[PLAIN])
    before = entries(converted[PLAIN])
    plan = plan_export(draft, TARGETS["sglang"])
    assert plan.tensors["fc.bias"].shape == (HIDDEN,)
    assert plan.config["architectures"] == ["LlamaForCausalLMEagle"]
    assert entries(converted[PLAIN]) == before


def test_the_command_line(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    run = speculators("export", converted[QWEN], tmp_path / "out", "--to", "sglang")
    assert (run.status, run.stdout, run.errors) == (0, "", [])
    assert run.messages[-1] == f"Exported for SGLang: {tmp_path / 'out'}"
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen2"


def test_the_command_line_says_what_cannot_be_done(
    tmp_path: Path, converted: dict[str, Path], speculators: CommandLine
) -> None:
    run = speculators("export", converted[NORMS], tmp_path / "out", "--to", "vllm")
    assert run.status == 1
    assert len(run.errors) == 1
    assert "extra layernorms" in run.errors[0]
    assert speculators("export", converted[NORMS], tmp_path / "out", "--to", "x").status == 2
    assert speculators("export", converted[NORMS], tmp_path / "out").status == 2


def test_the_command_line_offers_every_target() -> None:
    assert {target for family in families() for target in family.targets} == READERS.keys()
