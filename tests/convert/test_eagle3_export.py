"""Export of EAGLE-3 drafts: what a reader takes; what it would drop is refused.

``test_round_trips.py`` takes what is exported back.

What the readers' own code does with the exports of the golden drafts, by which the limits are set:

| reader | version | what was run | result |
| --- | --- | --- | --- |
| vLLM | 0.29.0, 0.31.0, 0.32.0 | the engine, in tests_vllm/test_eagle3.py | the golden tokens |
| SGLang | 0.5.23 | srt/models/llama_eagle3.py: model, loader and token map, over plain layers | golden chains, within 2e-6; srt/models/llama.py never captures what leaves the last layer |
| SpecForge | 0.2.0 | AutoDraftModel, and its training's unrolling | golden chains, within 3e-6; P-EAGLE is loaded whole |
| ModelOpt | 0.47.0 | EagleModule and EagleExporter's check of names (it reads no drafts) | loaded whole, valid |
| llama.cpp | b11434 | convert_hf_to_gguf.py and llama-server: the drafted tokens, and how likely they are | golden drafts, within 0.001 |
| TensorRT-LLM | a copy of 2026 | _torch/models/modeling_speculative.py was only read | no fc for a single state |
"""  # noqa: E501

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eagle3 import GOLDEN3, NAMES, TARGET
from helpers import CommandLine, config_of, stored_tensors
from llamacpp_reads import check_against_the_record
from speculators.convert.conversion import convert
from speculators.convert.export import export
from speculators.errors import ConversionError
from speculators.families.eagle3 import EAGLE3
from speculators.families.readers import READERS
from speculators.inspection.checkpoint import inspect_checkpoint

ONE_STATE, THREE = "norm_before_fc", "modelopt_4aux"
NEWER, PARALLEL, QWEN3 = "eagle31_specforge", "peagle_speculators", "speculators_qwen3_2layer"
RESIDUAL = "speculators_norm_before_residual_true"

REFUSED: dict[tuple[str, str], str] = {
    **dict.fromkeys([(NEWER, it) for it in ("eagle", "llamacpp")], "a norm on each of the"),
    (NEWER, "modelopt"): "an embedding of its own and a norm on each",
    **dict.fromkeys(
        [("fc_bias", it) for it in ("eagle", "vllm", "specforge", "modelopt", "llamacpp")],
        "a bias on fc",
    ),
    ("modelopt_4aux", "eagle"): "reads 4 states",
    ("modelopt_4aux", "specforge"): "reads 4 states",
    ("modelopt_4aux", "llamacpp"): "reads 4 states",
    **dict.fromkeys(
        [("norm_before_fc", it) for it in ("eagle", "specforge", "modelopt")],
        "a norm on all of the verifier's states",
    ),
    **dict.fromkeys(
        [("norm_before_fc", it) for it in ("sglang", "llamacpp")],
        "leaves the verifier's last layer",
    ),
    **dict.fromkeys(
        [(PARALLEL, it) for it in ("eagle", "sglang", "modelopt", "llamacpp", "trtllm")],
        "a hidden state for tokens that are not drafted yet",
    ),
    ("qwen3_specforge", "eagle"): "heads of size 24",
    **dict.fromkeys(
        [(name, "modelopt") for name in ("qwen3_specforge", "target_hidden_48")],
        "an embedding of its own",
    ),
    ("speculators_norm_before_residual_false", "modelopt"): "an embedding of its own",
    (RESIDUAL, "modelopt"): "an embedding of its own",
    **dict.fromkeys(
        [(RESIDUAL, it) for it in ("eagle", "sglang", "specforge", "trtllm")],
        "norm_before_residual",
    ),
    (QWEN3, "vllm"): "biases in the attention beside norms on queries and keys",
    **dict.fromkeys(
        [(QWEN3, it) for it in EAGLE3.targets if it != "vllm"], "norms on queries and keys"
    ),
}
"""A golden draft, and a reader that computes something else → the feature that the error names."""

FOR_LLAMACPP = [name for name in NAMES if (name, "llamacpp") not in REFUSED]


@pytest.mark.parametrize(("name", "to"), REFUSED)
def test_what_a_reader_cannot_compute_is_named(
    tmp_path: Path, eagle3_drafts: dict[str, Path], name: str, to: str
) -> None:
    with pytest.raises(ConversionError) as caught:
        export(eagle3_drafts[name], tmp_path / "out", to)
    assert REFUSED[name, to] in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sailab_llama", "fullvocab", "target_hidden_48"])
def test_the_research_layout_is_the_original(
    tmp_path: Path, eagle3_drafts: dict[str, Path], name: str
) -> None:
    out = export(eagle3_drafts[name], tmp_path / "out", "eagle")
    found, expected = stored_tensors(out), stored_tensors(GOLDEN3 / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[it], expected[it]) for it in expected)
    config, original = config_of(out), config_of(GOLDEN3 / name)
    assert {key: config[key] for key in original if key in config} == {
        key: value for key, value in original.items() if key in config
    }
    left = original.keys() - config.keys()
    assert left <= {"transformers_version", "use_cache", "pretraining_tp"}


def test_layers_are_numbered_as_the_reader_does(
    tmp_path: Path, eagle3_drafts: dict[str, Path]
) -> None:
    draft = eagle3_drafts[ONE_STATE]
    config = config_of(export(draft, tmp_path / "trtllm", "trtllm"))
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [3, 5, 7]
    assert "eagle_aux_hidden_state_layer_ids" not in config
    config = config_of(export(draft, tmp_path / "vllm", "vllm"))
    assert config["eagle_aux_hidden_state_layer_ids"] == [4, 6, 8]
    assert config["norm_before_residual"] is False
    four = config_of(export(eagle3_drafts[THREE], tmp_path / "four", "vllm"))
    assert four["num_aux_hidden_states"] == 4


def test_modelopt_wants_no_flags(tmp_path: Path, eagle3_drafts: dict[str, Path]) -> None:
    out = export(eagle3_drafts[THREE], tmp_path / "out", "modelopt")
    assert stored_tensors(out).keys() == stored_tensors(GOLDEN3 / THREE).keys()
    assert config_of(out)["eagle_config"] == config_of(GOLDEN3 / THREE)["eagle_config"]


def test_specforge_wants_tables_of_a_whole_vocabulary(
    tmp_path: Path, eagle3_drafts: dict[str, Path]
) -> None:
    found = stored_tensors(export(eagle3_drafts["fullvocab"], tmp_path / "out", "specforge"))
    assert torch.equal(found["d2t"], torch.zeros(320, dtype=torch.int64))
    assert torch.equal(found["t2d"], torch.ones(320, dtype=torch.bool))


def test_parallel_drafts_keep_their_numbers(tmp_path: Path, eagle3_drafts: dict[str, Path]) -> None:
    out = export(eagle3_drafts[PARALLEL], tmp_path / "out", "specforge")
    assert "layers.0.hidden_norm.weight" in stored_tensors(out)
    assert config_of(out)["architectures"] == ["PEagleDraftModel"]
    served = config_of(export(eagle3_drafts[PARALLEL], tmp_path / "served", "vllm"))
    assert (served["pard_token"], served["architectures"]) == (317, ["LlamaForCausalLMEagle3"])


def with_rope(directory: Path, scaling: dict[str, Any]) -> Path:
    """A golden draft with RoPE scaling, converted."""
    source = directory / "source"
    source.mkdir(parents=True)
    config = config_of(GOLDEN3 / "sailab_llama") | {"rope_scaling": scaling}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").symlink_to(GOLDEN3 / "sailab_llama" / "model.safetensors")
    return convert(source, directory / "draft", TARGET, family=EAGLE3, validate=False)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(("scaling", "trained"), [(LLAMA3, 64), (YARN, 256)])
def test_llamacpp_reads_rope_where_it_looks(
    tmp_path: Path, scaling: dict[str, Any], trained: int
) -> None:
    """With these, b11434 drafted what transformers' RoPE gives; it does not convert YaRN without
    the length that the draft was trained for."""
    draft = with_rope(tmp_path, scaling)
    exported = config_of(export(draft, tmp_path / "out", "llamacpp"))
    assert exported["original_max_position_embeddings"] == trained
    with pytest.raises(ConversionError, match=f"{scaling['rope_type']} RoPE scaling"):
        export(draft, tmp_path / "none", "eagle")


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, "has dynamic RoPE scaling"),
        (YARN | {"beta_fast": 16}, "has YaRN RoPE scaling with beta_fast 16"),
        (YARN | {"attention_factor": 1.3}, "has YaRN RoPE scaling with attention_factor 1.3"),
    ],
)
def test_rope_that_llamacpp_does_not_read_is_refused(
    tmp_path: Path, scaling: dict[str, Any], expected: str
) -> None:
    """b11434 writes YaRN's parameters into the GGUF, and drafts as if they had their defaults."""
    draft = with_rope(tmp_path, scaling)
    with pytest.raises(ConversionError, match=expected):
        export(draft, tmp_path / "out", "llamacpp")


@pytest.mark.parametrize("name", FOR_LLAMACPP)
def test_llamacpp_reads_what_it_read_when_it_was_run(
    tmp_path: Path, eagle3_drafts: dict[str, Path], name: str
) -> None:
    """Against the record of a run of its converter, whose GGUF then drafted the golden chains."""
    draft = eagle3_drafts[name]
    check_against_the_record(name, export(draft, tmp_path / "out", "llamacpp"), config_of(draft))


@pytest.mark.parametrize(
    ("layers", "to", "expected"),
    [
        ([2, 4, 6], "eagle", r"\[2, 4, 6\], and not \[2, 4, 5\]"),
        ([0, 4, 5], "sglang", r"the verifier's embeddings \(numbered 0\)"),
        ([0, 4, 5], "trtllm", r"the verifier's embeddings \(numbered 0\)"),
        # What SGLang 0.5.23 captures is what enters a layer (srt/models/llama.py), and SpecForge
        # 0.2.0 captures by SGLang (offline_capture/sglang_backend/capture.py).
        ([2, 4, 8], "sglang", r"leaves the verifier's last layer \(numbered 8\)"),
        ([2, 4, 8], "specforge", r"leaves the verifier's last layer \(numbered 8\)"),
        # llama.cpp b11434, src/models/llama.cpp: only what enters a layer is kept.
        ([2, 4, 8], "llamacpp", r"leaves the verifier's last layer \(numbered 8\)"),
    ],
)
def test_layers_that_a_reader_cannot_be_told(
    tmp_path: Path, layers: list[int], to: str, expected: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to(GOLDEN3 / "sailab_llama" / name)
    draft = convert(
        source,
        tmp_path / "draft",
        TARGET,
        family=EAGLE3,
        options={"aux_layers": layers},
        validate=False,
    )
    with pytest.raises(ConversionError, match=expected):
        export(draft, tmp_path / "out", to)
    export(draft, tmp_path / "vllm", "vllm")


def test_the_last_state_of_gpt_oss_can_be_captured(
    tmp_path: Path, eagle3_drafts: dict[str, Path]
) -> None:
    """SGLang 0.5.23, srt/models/gpt_oss.py; and other layers are exported with such a norm."""
    draft = shutil.copytree(eagle3_drafts[ONE_STATE], tmp_path / "draft")
    config = config_of(draft)
    config["speculators_config"]["verifier"]["architectures"] = ["GptOssForCausalLM"]
    (draft / "config.json").write_text(json.dumps(config))
    assert config_of(export(draft, tmp_path / "out", "sglang"))["norm_before_fc"] is True


def test_tensorrt_has_no_fc_for_one_state(tmp_path: Path) -> None:
    """_torch/models/modeling_speculative.py: ``if self.spec_config.num_capture_layers > 1``."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = stored_tensors(GOLDEN3 / "sailab_llama")
    tensors["fc.weight"] = tensors["fc.weight"][:, :64].clone()
    save_file(tensors, source / "model.safetensors")
    shutil.copy(GOLDEN3 / "sailab_llama" / "config.json", source)
    draft = convert(
        source,
        tmp_path / "draft",
        TARGET,
        family=EAGLE3,
        options={"aux_layers": [4]},
        validate=False,
    )
    with pytest.raises(ConversionError, match="reads only one state"):
        export(draft, tmp_path / "out", "trtllm")


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("sailab_llama", "llamacpp", "--target-model-dir with the directory of "),
        ("sailab_llama", "trtllm", "set eagle3_layers_to_capture to [1, 3, 4]"),
        ("qwen3_specforge", "sglang", "SGLang uses the verifier's embedding"),
        (NEWER, "specforge", "it takes pull request 879"),
        (PARALLEL, "vllm", "parallel_drafting true"),
    ],
)
def test_what_to_tell_the_reader_is_printed(
    tmp_path: Path,
    eagle3_drafts: dict[str, Path],
    speculators: CommandLine,
    name: str,
    to: str,
    expected: str,
) -> None:
    run = speculators("export", eagle3_drafts[name], tmp_path / "out", "--to", to)
    assert run.status == 0
    assert any(expected in message for message in run.messages)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_says_who_can_take_it(eagle3_drafts: dict[str, Path], name: str) -> None:
    possible = [to for to in EAGLE3.targets if (name, to) not in REFUSED]
    assert inspect_checkpoint(eagle3_drafts[name]).exports == possible


def test_every_target_has_a_reader() -> None:
    assert EAGLE3.targets.keys() == READERS.keys() - {"dflash"}
