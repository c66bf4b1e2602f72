"""Converting: what is logged, what is written, and from what."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (
    GOLDEN,
    GOLDEN_NAMES,
    PLAIN,
    TOLERANCE,
    WRITTEN,
    CommandLine,
    Tensors,
    config_of,
    entries,
    golden_vectors,
    largest_difference,
    run_process,
    save_quietly,
    source_config,
    source_tensors,
    stored_tensors,
    tiny_llama,
    write_checkpoint,
    write_shards,
)
from speculators import __version__
from speculators.convert.eagle import LAYERNORM_MAPPINGS, EagleConverter
from speculators.errors import OutputError, SpeculatorsError, ValidationError
from speculators.models.eagle import EagleSpeculator

convert = EagleConverter().convert

CHANGE = re.compile(r"([=~+-]) ([\w.]+): ")
"""Matches what a dry run says about a key of config.json."""


def without_embedding(tensors: Tensors) -> None:
    del tensors["embed_tokens.weight"]


# What is logged


def test_the_log_of_a_conversion_to_the_letter(
    tmp_path: Path, verifier: Path, speculators: CommandLine
) -> None:
    source, output = GOLDEN / PLAIN, tmp_path / "out"
    run = speculators("convert", "eagle", source, output, verifier)
    assert run.status == 0
    assert run.stdout == ""
    lines = [re.split(r" +\| +", line) for line in run.stderr.splitlines()]
    assert [(level, message) for _, level, message in lines] == [
        ("INFO", f"Converting Eagle checkpoint: {source}"),
        ("INFO", "Loaded 10 weights"),
        ("INFO", "Validating converted checkpoint..."),
        ("SUCCESS", "Model loaded successfully"),
        ("SUCCESS", "Forward pass successful"),
        ("SUCCESS", f"Saved to: {output}"),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", time) for time, *_ in lines)


def test_the_log_of_a_process_is_the_same(tmp_path: Path, verifier: Path) -> None:
    """Nothing that transformers or torch print gets into it."""
    run = run_process("convert", "eagle", GOLDEN / PLAIN, "out", verifier, cwd=tmp_path)
    assert run.status == 0, run.stderr
    assert run.stdout == ""
    assert run.messages == [
        f"Converting Eagle checkpoint: {GOLDEN / PLAIN}",
        "Loaded 10 weights",
        "Validating converted checkpoint...",
        "Model loaded successfully",
        "Forward pass successful",
        "Saved to: out",
    ]
    assert len(run.messages) == len(run.stderr.splitlines())
    assert entries(tmp_path) == ["out", *(f"out/{name}" for name in WRITTEN)]


def test_without_validation_nothing_is_said_of_it(
    tmp_path: Path, verifier: Path, speculators: CommandLine
) -> None:
    run = speculators("convert", "eagle", GOLDEN / PLAIN, tmp_path / "o", verifier, "--no-validate")
    assert run.messages == [
        f"Converting Eagle checkpoint: {GOLDEN / PLAIN}",
        "Loaded 10 weights",
        f"Saved to: {tmp_path / 'o'}",
    ]


@pytest.mark.parametrize(
    ("name", "count"), list(zip(GOLDEN_NAMES, [10, 14, 10, 13, 11], strict=True))
)
def test_the_number_of_weights(
    tmp_path: Path, verifiers: dict[str, Path], log: list[str], name: str, count: int
) -> None:
    convert(GOLDEN / name, tmp_path / "out", verifiers[name], validate=False)
    assert f"INFO Loaded {count} weights" in log


def test_renamed_tensors_are_in_the_debug_log(
    tmp_path: Path, verifiers: dict[str, Path], log: list[str]
) -> None:
    convert(GOLDEN / "ttt_layernorms", tmp_path / "out", verifiers["ttt_layernorms"])
    remapped = [line for line in log if line.startswith("DEBUG Remapped: ")]
    assert remapped == [
        "DEBUG Remapped: embed_layernorm.weight -> post_embedding_layernorm.weight",
        "DEBUG Remapped: lm_head_layernorm.weight -> pre_lm_head_layernorm.weight",
    ]
    assert any("DEBUG Detected: " in line and "layernorms=True" in line for line in log)


def test_details_are_shown_with_debug_alone(
    tmp_path: Path, verifiers: dict[str, Path], speculators: CommandLine
) -> None:
    name = "ttt_layernorms"
    arguments = ("convert", "eagle", GOLDEN / name, tmp_path / "out", verifiers[name])
    assert "Remapped" not in speculators(*arguments).stderr
    assert "Remapped" in speculators(*arguments, "--overwrite", "--debug").stderr


def test_where_config_and_tensors_disagree_a_warning_says_so(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    hints = {"bias": True, "qkv_bias": True, "num_hidden_layers": 32, "head_dim": 32}
    convert(write_checkpoint(tmp_path / "source", config=hints), tmp_path / "out", verifier)
    warnings = [line for line in log if line.startswith("WARNING")]
    for words in (
        "bias: true, the tensors say false",
        "qkv_bias: true, the tensors say false",
        "num_hidden_layers 32",
        "head_dim 32, the tensors have 16",
    ):
        assert any(words in line for line in warnings), words


def test_the_unused_rope_theta_of_linear_scaling_is_told(
    tmp_path: Path, verifiers: dict[str, Path], log: list[str]
) -> None:
    out = convert(GOLDEN / "rope_linear", tmp_path / "out", verifiers["rope_linear"])
    assert any("WARNING" in line and "rope_theta 500000 is not used" in line for line in log)
    layer = config_of(out)["transformer_layer_config"]
    assert layer["rope_theta"] == 10000.0
    assert layer["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


# How it is called


@pytest.mark.parametrize("kind", [str, Path])
def test_str_and_path_are_taken_and_the_path_comes_back(
    tmp_path: Path, verifier: Path, kind: type
) -> None:
    output = tmp_path / "out"
    returned = EagleConverter().convert(kind(GOLDEN / PLAIN), kind(output), kind(verifier))
    assert isinstance(returned, Path)
    assert returned == output
    assert entries(output) == WRITTEN


def test_one_converter_converts_many(tmp_path: Path, verifiers: dict[str, Path]) -> None:
    converter = EagleConverter()
    for round_number in range(2):
        for name in GOLDEN_NAMES:
            out = converter.convert(
                GOLDEN / name, tmp_path / f"{name}-{round_number}", verifiers[name]
            )
            expected = {LAYERNORM_MAPPINGS.get(n, n): t for n, t in source_tensors(name).items()}
            stored = stored_tensors(out)
            assert stored.keys() == expected.keys()
            assert all(torch.equal(stored[n], t) for n, t in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}-{i}" for name in GOLDEN_NAMES for i in range(2)
    )


def test_two_conversions_give_the_same_bytes(tmp_path: Path, verifier: Path) -> None:
    one, two = (convert(GOLDEN / PLAIN, tmp_path / name, verifier) for name in ("one", "two"))
    for name in WRITTEN:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_every_error_is_a_speculators_error(tmp_path: Path, verifier: Path) -> None:
    with pytest.raises(SpeculatorsError):
        convert(tmp_path / "nowhere", tmp_path / "out", verifier)


def test_relative_paths(tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "source")
    (tmp_path / "verifier").symlink_to(verifier)
    monkeypatch.chdir(tmp_path)
    assert convert("./source", "new/out", "./verifier") == Path("new/out")
    named = config_of(tmp_path / "new" / "out")["speculators_config"]["verifier"]["name_or_path"]
    assert Path(named).is_absolute()
    monkeypatch.chdir("/")
    model = EagleSpeculator.from_pretrained(tmp_path / "new" / "out")
    assert model.get_output_embeddings() is not None


def test_the_output_can_be_read_as_the_umask_says(tmp_path: Path, verifier: Path) -> None:
    before = os.umask(0o027)
    try:
        out = convert(GOLDEN / PLAIN, tmp_path / "out", verifier)
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o640


# What is taken


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_names_with_a_prefix(
    tmp_path: Path, verifiers: dict[str, Path], name: str, container: str
) -> None:
    def prefix(tensors: Tensors) -> None:
        for stored in list(tensors):
            tensors[f"model.{stored}"] = tensors.pop(stored)

    source = write_checkpoint(tmp_path / "source", name=name, edit=prefix, container=container)
    out = convert(source, tmp_path / "out", verifiers[name])
    g = golden_vectors(name)
    logits = EagleSpeculator.from_pretrained(out)(g["input_ids"], g["hidden_states"]).logits
    assert largest_difference(logits, g["logits"]) < TOLERANCE
    assert not any(stored.startswith("model.") for stored in stored_tensors(out))


def test_a_mixtral_config_gives_a_dense_llama_layer(tmp_path: Path, verifier: Path) -> None:
    mixtral = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "router_aux_loss_coef": 0.02,
    }
    out = convert(write_checkpoint(tmp_path / "source", config=mixtral), tmp_path / "out", verifier)
    config = config_of(out)
    assert config["transformer_layer_config"]["model_type"] == "llama"
    assert config["transformer_layer_architecture"] == "LlamaDecoderLayer"
    assert not mixtral.keys() - {"model_type"} & config["transformer_layer_config"].keys()
    g = golden_vectors(PLAIN)
    logits = EagleSpeculator.from_pretrained(out)(g["input_ids"], g["hidden_states"]).logits
    assert largest_difference(logits, g["logits"]) < TOLERANCE


def test_a_qwen2_checkpoint_gives_a_qwen2_layer(converted: dict[str, Path]) -> None:
    config = config_of(converted["qwen2_qkv_bias"])
    assert config["transformer_layer_config"]["model_type"] == "qwen2"
    assert config["architectures"] == ["EagleSpeculator", "Qwen2DecoderLayer"]
    assert config["fusion_bias"] is True


def test_a_qwen2_config_without_biases_gives_a_llama_layer(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "source", config={"model_type": "qwen2"})
    out = convert(source, tmp_path / "out", verifier)
    assert config_of(out)["transformer_layer_config"]["model_type"] == "llama"


@pytest.mark.parametrize("ids", [[2, 7], [2], 128001])
def test_eos_ids_come_as_they_are(tmp_path: Path, verifier: Path, ids: object) -> None:
    source = write_checkpoint(tmp_path / "source", config={"eos_token_id": ids})
    out = convert(source, tmp_path / "out", verifier)
    assert config_of(out)["transformer_layer_config"].get("eos_token_id") == ids
    assert EagleSpeculator.from_pretrained(out).config.layer.eos_token_id == ids


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_of_other_ids_in_a_list_the_first_is_taken_and_told(
    tmp_path: Path, verifier: Path, log: list[str], key: str
) -> None:
    """The configs of transformers hold only one."""
    out = convert(
        write_checkpoint(tmp_path / "source", config={key: [5, 6]}), tmp_path / "out", verifier
    )
    assert config_of(out)["transformer_layer_config"][key] == 5
    assert any("WARNING" in line and f"{key} is the list [5, 6]" in line for line in log)
    assert EagleSpeculator.from_pretrained(out).fc is not None


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_without_an_embedding_the_verifiers_is_used(tmp_path: Path, name: str) -> None:
    g, embedding = golden_vectors(name), source_tensors(name)["embed_tokens.weight"]
    verifier = save_quietly(tiny_llama(g["lm_head.weight"], embedding), tmp_path / "verifier")
    source = write_checkpoint(tmp_path / "source", name=name, edit=without_embedding)
    out = convert(source, tmp_path / "out", verifier)
    assert "embed_tokens.weight" not in stored_tensors(out)
    model = EagleSpeculator.from_pretrained(out)
    logits = model(g["input_ids"], g["hidden_states"]).logits
    assert largest_difference(logits, g["logits"]) < TOLERANCE


def test_an_inv_freq_is_left_out_with_the_reason(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    name = "layers.0.self_attn.rotary_emb.inv_freq"
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.update({name: torch.ones(8)})
    )
    out = convert(source, tmp_path / "out", verifier)
    assert name not in stored_tensors(out)
    assert any(line.startswith(f"DEBUG Left out: {name}: ") for line in log)


def test_safetensors_go_before_bin(tmp_path: Path, verifier: Path, log: list[str]) -> None:
    source = write_checkpoint(tmp_path / "source")
    torch.save({}, source / "pytorch_model.bin")
    convert(source, tmp_path / "out", verifier)
    assert any("model.safetensors is read" in line for line in log)


def test_tensors_that_are_views_are_written_in_their_own_order(
    tmp_path: Path, verifier: Path
) -> None:
    """A transposed tensor in a .bin has its bytes in another order."""

    def transpose(tensors: Tensors) -> None:
        for name in ("fc.weight", "layers.0.mlp.up_proj.weight"):
            tensors[name] = tensors[name].T.contiguous().T
            assert not tensors[name].is_contiguous()
        # and one that is a part of a larger storage:
        name = "layers.0.mlp.gate_proj.weight"
        tensors[name] = torch.cat([torch.zeros(5, 64), tensors[name], torch.ones(3, 64)])[5:-3]

    source = write_checkpoint(tmp_path / "source", edit=transpose, container="pytorch_model.bin")
    stored = stored_tensors(convert(source, tmp_path / "out", verifier))
    assert all(torch.equal(stored[name], tensor) for name, tensor in source_tensors().items())


def test_sharded_input_is_taken(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    tensors = source_tensors()
    names = sorted(tensors)
    write_shards(
        source,
        {
            f"model-0000{i + 1}-of-00003.safetensors": {n: tensors[n] for n in names[i::3]}
            for i in range(3)
        },
    )
    stored = stored_tensors(convert(source, tmp_path / "out", verifier))
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in names)


def test_sharded_bin_input_is_taken(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    tensors = source_tensors()
    weight_map: dict[str, str] = {}
    for i in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[i::2]}
        torch.save(part, source / f"part-{i}.bin")
        weight_map |= dict.fromkeys(part, f"part-{i}.bin")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    stored = stored_tensors(convert(source, tmp_path / "out", verifier))
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_a_state_dict_wrapper_is_opened(tmp_path: Path, verifier: Path, legacy: bool) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save(
        {"state_dict": source_tensors(), "epoch": 3},
        source / "pytorch_model.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    stored = stored_tensors(convert(source, tmp_path / "out", verifier))
    assert stored.keys() == source_tensors().keys()
    assert all(torch.equal(stored[name], t) for name, t in source_tensors().items())


def test_biases_of_q_k_and_v_are_kept(converted: dict[str, Path]) -> None:
    stored, source = stored_tensors(converted["qwen2_qkv_bias"]), source_tensors("qwen2_qkv_bias")
    biases = [name for name in source if name.endswith("proj.bias")]
    assert len(biases) == 3
    assert all(torch.equal(stored[name], source[name]) for name in biases)


@pytest.mark.parametrize(
    ("name", "flag"), [("vicuna_default_bias", "fusion_bias"), ("ttt_layernorms", "layernorms")]
)
@pytest.mark.parametrize("said", [True, False])
def test_the_tensors_decide_on_a_feature_whatever_its_flag(
    tmp_path: Path, verifiers: dict[str, Path], name: str, flag: str, said: bool
) -> None:
    source = write_checkpoint(tmp_path / "source", name=name)
    flags: dict[str, Any] = {flag: said}
    out = convert(source, tmp_path / "out", verifiers[name], **flags)
    assert config_of(out)[flag] is True
    assert len(stored_tensors(out)) == len(source_tensors(name))


# The verifier


def test_with_the_verifiers_config_alone_the_log_says_that_logits_were_not_validated(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    bare = tmp_path / "verifier"
    bare.mkdir()
    (bare / "config.json").write_bytes((verifier / "config.json").read_bytes())
    out = convert(GOLDEN / PLAIN, tmp_path / "out", bare)
    assert any(line.startswith("WARNING Logits were not validated") for line in log)
    assert "SUCCESS Forward pass successful" in log
    assert all(
        torch.equal(stored_tensors(out)[name], tensor) for name, tensor in source_tensors().items()
    )


def test_with_the_verifiers_weights_no_warning_is_logged(
    tmp_path: Path, verifier: Path, log: list[str]
) -> None:
    convert(GOLDEN / PLAIN, tmp_path / "out", verifier)
    assert not [line for line in log if line.startswith(("WARNING", "ERROR"))]


def test_with_the_verifiers_config_alone_the_rest_is_still_validated(
    tmp_path: Path, verifier: Path
) -> None:
    bare = tmp_path / "verifier"
    bare.mkdir()
    (bare / "config.json").write_bytes((verifier / "config.json").read_bytes())
    source = write_checkpoint(
        tmp_path / "source",
        edit=lambda tensors: tensors["fc.weight"].fill_(torch.nan),
    )
    with pytest.raises(ValidationError):
        convert(source, tmp_path / "out", bare)
    assert not (tmp_path / "out").exists()


def shard(verifier: Path, directory: Path) -> Path:
    """The verifier's tensors in three files: embedding, head, all others."""
    directory.mkdir()
    (directory / "config.json").write_bytes((verifier / "config.json").read_bytes())
    tensors = stored_tensors(verifier)
    parts: dict[str, Tensors] = {"embedding.safetensors": {}, "head.safetensors": {}}
    parts["rest.safetensors"] = {}
    for name, tensor in tensors.items():
        kind = "embedding" if "embed" in name else "head" if "lm_head" in name else "rest"
        parts[f"{kind}.safetensors"][name] = tensor
    write_shards(directory, parts)
    return directory


@pytest.mark.parametrize("own_embedding", [True, False])
def test_of_a_verifier_in_shards_only_the_needed_ones_are_read(
    tmp_path: Path, own_verifier: Path, log: list[str], own_embedding: bool
) -> None:
    sharded = shard(own_verifier, tmp_path / "verifier")
    (sharded / "rest.safetensors").write_bytes(b"must not be read")
    if own_embedding:
        (sharded / "embedding.safetensors").unlink()
        source = write_checkpoint(tmp_path / "source")
    else:
        source = write_checkpoint(tmp_path / "source", edit=without_embedding)
    out = convert(source, tmp_path / "out", sharded)
    assert not [line for line in log if line.startswith("WARNING")]
    g = golden_vectors(PLAIN)
    logits = EagleSpeculator.from_pretrained(out)(g["input_ids"], g["hidden_states"]).logits
    assert largest_difference(logits, g["logits"]) < TOLERANCE


@pytest.mark.parametrize("own_embedding", [True, False])
def test_a_verifier_with_tied_embeddings_has_its_embedding_as_its_head(
    tmp_path: Path, log: list[str], own_embedding: bool
) -> None:
    g = golden_vectors(PLAIN)
    model = tiny_llama(embedding=g["lm_head.weight"], tie_word_embeddings=True)
    verifier = save_quietly(model, tmp_path / "verifier")
    assert "lm_head.weight" not in stored_tensors(verifier)
    edit = (lambda _: None) if own_embedding else without_embedding
    out = convert(write_checkpoint(tmp_path / "source", edit=edit), tmp_path / "out", verifier)
    assert not [line for line in log if line.startswith("WARNING")]
    output = EagleSpeculator.from_pretrained(out)(g["input_ids"], g["hidden_states"])
    if own_embedding:
        assert largest_difference(output.logits, g["logits"]) < TOLERANCE
    head = output.last_hidden_state @ g["lm_head.weight"].T
    assert largest_difference(output.logits, head) < TOLERANCE


def test_the_verifiers_architectures_are_recorded(tmp_path: Path, verifier: Path) -> None:
    other = tmp_path / "verifier"
    other.mkdir()
    config = json.loads((verifier / "config.json").read_text())
    config["architectures"] = ["Gemma9ForCausalLM"]
    (other / "config.json").write_text(json.dumps(config))
    out = convert(GOLDEN / PLAIN, tmp_path / "out", other, validate=False)
    assert config_of(out)["speculators_config"]["verifier"] == {
        "name_or_path": str(other),
        "architectures": ["Gemma9ForCausalLM"],
    }


def test_sizes_of_a_composite_verifier_are_those_of_its_text_part(
    tmp_path: Path, verifier: Path
) -> None:
    other = tmp_path / "verifier"
    other.mkdir()
    config = {"architectures": ["X"], "text_config": {"hidden_size": 64, "vocab_size": 320}}
    (other / "config.json").write_text(json.dumps(config))
    tensors = {"language_model.lm_head.weight": golden_vectors(PLAIN)["lm_head.weight"]}
    write_shards(other, {"model-1.safetensors": tensors})
    out = convert(GOLDEN / PLAIN, tmp_path / "out", other)
    g = golden_vectors(PLAIN)
    logits = EagleSpeculator.from_pretrained(out)(g["input_ids"], g["hidden_states"]).logits
    assert largest_difference(logits, g["logits"]) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_head_equal_to_the_verifiers_is_left_out_with_the_reason(
    tmp_path: Path, verifier: Path, log: list[str], prefix: str
) -> None:
    head = golden_vectors(PLAIN)["lm_head.weight"]
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.update({f"{prefix}lm_head.weight": head})
    )
    out = convert(source, tmp_path / "out", verifier)
    assert "lm_head.weight" not in stored_tensors(out)
    assert any(
        line.startswith(f"DEBUG Left out: {prefix}lm_head.weight: ") and "verifier" in line
        for line in log
    )
    assert "INFO Loaded 11 weights" in log


def test_a_head_rounded_to_float16_still_counts_as_the_verifiers(
    tmp_path: Path, verifier: Path
) -> None:
    head = golden_vectors(PLAIN)["lm_head.weight"].half()
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.update({"lm_head.weight": head})
    )
    assert convert(source, tmp_path / "out", verifier).is_dir()


# What is written


def test_the_config_of_a_converted_checkpoint(converted: dict[str, Path], verifier: Path) -> None:
    assert config_of(converted[PLAIN]) == {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "speculators_model_type": "eagle",
        "speculators_version": __version__,
        "torch_dtype": "float32",
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": {
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        },
        "layernorms": False,
        "fusion_bias": False,
        "speculators_config": {
            "algorithm": "eagle",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 5,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": str(verifier), "architectures": ["LlamaForCausalLM"]},
        },
    }


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("rope_theta", 12345.0, 12345.0),
        ("rms_norm_eps", 0.003, 0.003),
        ("hidden_act", "gelu", "gelu"),
        ("max_position_embeddings", 4321, 4321),
        ("initializer_range", 0.5, 0.5),
        ("rope_scaling", LLAMA3, LLAMA3),
        (
            "rope_scaling",
            {"type": "dynamic", "factor": 3.0},
            {"rope_type": "dynamic", "factor": 3.0},
        ),
        ("bos_token_id", 128000, 128000),
        ("pad_token_id", 9, 9),
    ],
)
def test_what_the_layer_needs_of_the_config_reaches_the_model(
    tmp_path: Path, verifier: Path, key: str, value: Any, kept: Any
) -> None:
    source = write_checkpoint(tmp_path / "source", config={key: value})
    out = convert(source, tmp_path / "out", verifier)
    assert config_of(out)["transformer_layer_config"][key] == kept
    layer = EagleSpeculator.from_pretrained(out).config.layer
    if key == "rope_theta":
        assert layer.rope_parameters["rope_theta"] == kept
    elif key == "rope_scaling":
        assert kept.items() <= layer.rope_parameters.items()
    else:
        assert getattr(layer, key) == kept


def test_the_default_number_of_key_value_heads_is_that_of_the_heads(
    converted: dict[str, Path],
) -> None:
    assert "num_key_value_heads" not in source_config("vicuna_default_bias")
    layer = config_of(converted["vicuna_default_bias"])["transformer_layer_config"]
    assert layer["num_key_value_heads"] == 4
    assert layer["rope_theta"] == 10000.0


def test_heads_may_not_divide_the_hidden_size(tmp_path: Path, verifier: Path) -> None:
    """As GLM-4.5's; the validation compares what the model computes with the reference."""

    def edit(tensors: Tensors) -> None:
        for name, (rows, columns) in {"q": (96, 64), "o": (64, 96)}.items():
            random = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) / 8
            tensors[f"layers.0.self_attn.{name}_proj.weight"] = random

    heads = {"num_attention_heads": 6, "head_dim": 16}
    out = convert(
        write_checkpoint(tmp_path / "s", config=heads, edit=edit), tmp_path / "o", verifier
    )
    model = EagleSpeculator.from_pretrained(out)
    assert model.config.layer.num_attention_heads == 6
    assert model.config.layer.head_dim == 16
    model.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(out)


def test_a_head_size_of_its_own_comes_from_the_tensors(tmp_path: Path, verifier: Path) -> None:
    """2 heads of 16, where hidden size by heads would be 32."""

    def narrow(tensors: Tensors) -> None:
        for name, axis in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
            key = f"layers.0.self_attn.{name}_proj.weight"
            size = tensors[key].shape[axis] // 2
            tensors[key] = tensors[key].narrow(axis, 0, size).contiguous()

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    source = write_checkpoint(tmp_path / "source", config=heads, edit=narrow)
    out = convert(source, tmp_path / "out", verifier)
    assert config_of(out)["transformer_layer_config"]["head_dim"] == 16


# --dry-run


def test_a_dry_run_names_every_tensor_and_writes_nothing(
    tmp_path: Path, verifiers: dict[str, Path], speculators: CommandLine
) -> None:
    """Names are not cut off, even if the output goes into a pipe."""
    name, head = "ttt_layernorms", "model.lm_head.weight"
    source = write_checkpoint(
        tmp_path / "source [b]",  # rich would read brackets as markup
        name=name,
        edit=lambda tensors: tensors.update({head: torch.zeros(320, 64)}),
    )
    before = entries(tmp_path)
    run = speculators("convert", "eagle", source, tmp_path / "o", verifiers[name], "--dry-run")
    assert run.status == 0
    assert entries(tmp_path) == before
    for stored in [*source_tensors(name), *LAYERNORM_MAPPINGS.values(), head]:
        assert re.search(rf"(^|  ){re.escape(stored)}(  |$)", run.stdout, re.MULTILINE), stored
    assert "left out: logits come from the verifier's own head" in run.stdout
    assert str(source) in run.stdout
    assert (
        '~ architectures: ["LlamaForCausalLM"] -> ["EagleSpeculator", "LlamaDecoderLayer"]  '
        "(the draft's own are written)\n"
    ) in run.stdout
    for line in (
        "= transformer_layer_config.hidden_size: 64",
        "- bias: false  (a hint: the tensors decide)",
        '+ speculators_model_type: "eagle"',
        "+ layernorms: true",
        "Nothing was written.",
    ):
        assert line in run.stdout.splitlines()


def test_a_dry_run_tells_what_is_in_the_way(
    tmp_path: Path, verifier: Path, speculators: CommandLine
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    run = speculators("convert", "eagle", GOLDEN / PLAIN, tmp_path / "out", verifier, "--dry-run")
    assert run.status == 0
    assert "Nothing was written." in run.stdout
    assert any(
        message.startswith(f"Without --dry-run this would fail: {tmp_path / 'out'} exists")
        for message in run.messages
    )


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_dry_run_tells_of_every_key_of_both_configs(
    tmp_path: Path, verifiers: dict[str, Path], speculators: CommandLine, name: str
) -> None:
    arguments = ("convert", "eagle", GOLDEN / name, tmp_path / "out", verifiers[name])
    lines = speculators(*arguments, "--dry-run").stdout.splitlines()
    assert speculators(*arguments, "--no-validate").status == 0
    told = {
        key: sign for sign, key in (m.groups() for m in map(CHANGE.match, lines) if m is not None)
    }
    for key, value in source_config(name).items():
        assert key in told or f"transformer_layer_config.{key}" in told or value is None
    written = config_of(tmp_path / "out")
    nested = {key: written.pop(key) for key in ("transformer_layer_config", "speculators_config")}
    expected = {*written, *(f"{key}.{inner}" for key in nested for inner in nested[key])}
    assert {key for key, sign in told.items() if sign != "-"} == expected


# --overwrite


def test_overwrite_replaces_a_converted_checkpoint_as_a_whole(
    tmp_path: Path, verifiers: dict[str, Path], speculators: CommandLine
) -> None:
    out = convert(GOLDEN / PLAIN, tmp_path / "out", verifiers[PLAIN])
    (out / "more.txt").write_text("of the old one")
    name = "ttt_layernorms"
    arguments = ("convert", "eagle", GOLDEN / name, out, verifiers[name])
    assert speculators(*arguments).status == 1
    assert "more.txt" in entries(out)
    assert speculators(*arguments, "--overwrite").status == 0
    assert entries(tmp_path) == ["out", *(f"out/{name}" for name in WRITTEN)]
    assert config_of(out)["layernorms"] is True


def test_an_empty_directory_may_be_the_output(tmp_path: Path, verifier: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(GOLDEN / PLAIN, tmp_path / "out", verifier)
    assert entries(tmp_path) == ["out", *(f"out/{name}" for name in WRITTEN)]


@pytest.mark.parametrize("config", ["{}", '{"model_type": "llama"}', None])
def test_overwrite_refuses_a_foreign_directory(
    tmp_path: Path, verifier: Path, config: str | None
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "data.txt").write_text("mine")
    if config is not None:
        (out / "config.json").write_text(config)
    before = entries(tmp_path)
    with pytest.raises(OutputError, match="not a converted checkpoint"):
        convert(GOLDEN / PLAIN, out, verifier, overwrite=True)
    assert entries(tmp_path) == before


def test_an_existing_directory_is_not_merged_into(tmp_path: Path, verifier: Path) -> None:
    source, out = write_checkpoint(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            convert(source, out, verifier, overwrite=overwrite)
        assert entries(out) == ["notes.txt"]


def test_output_equal_to_input_is_refused_by_any_name(tmp_path: Path, verifier: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(source)
    for given, output in [(source, source), (source, link), (link, source), (source, link / ".")]:
        for overwrite in (False, True):
            with pytest.raises(OutputError):
                convert(given, output, verifier, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("held", ["input", "verifier"])
def test_an_output_that_holds_what_is_read_is_not_replaced(tmp_path: Path, held: str) -> None:
    """Replacing it would delete the source."""
    out = tmp_path / "out"
    source = write_checkpoint((out if held == "input" else tmp_path) / "source")
    verifier = save_quietly(
        tiny_llama(golden_vectors(PLAIN)["lm_head.weight"]),
        (out if held == "verifier" else tmp_path) / "verifier",
    )
    (out / "config.json").write_text('{"speculators_model_type": "eagle"}')
    before = entries(tmp_path)
    with pytest.raises(OutputError, match=f"holds the {held}"):
        convert(source, out, verifier, overwrite=True)
    assert entries(tmp_path) == before


def test_what_appears_at_the_output_meanwhile_is_not_overwritten(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import speculators.convert.validation as module

    out = tmp_path / "out"

    def another_process(*_: object, **__: object) -> list[str]:
        out.mkdir()
        (out / "theirs.txt").write_text("x")
        return []

    monkeypatch.setattr(module, "validate_conversion", another_process)
    with pytest.raises(OutputError, match="exists"):
        convert(GOLDEN / PLAIN, out, verifier)
    assert entries(tmp_path) == ["out", "out/theirs.txt"]


# Validation


@pytest.mark.parametrize(
    ("what", "words"),
    [("bytes", "differs from"), ("head", "The logits are not")],
)
def test_validation_finds_a_wrong_result(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch, what: str, words: str
) -> None:
    """The test breaks what was written, or the model that is loaded."""
    import speculators.convert.conversion as converter
    import speculators.models.speculator as base

    if what == "bytes":
        from speculators.checkpoint.output.writer import write_safetensors_file as write

        def write_wrong(path: Path, *arguments: Any, **options: Any) -> None:
            write(path, *arguments, **options)
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

        monkeypatch.setattr(converter, "write_safetensors_file", write_wrong)
    else:
        from speculators.models.layers import frozen_linear as borrow

        monkeypatch.setattr(base, "frozen_linear", lambda weight: borrow(weight.flip(0)))
    with pytest.raises(ValidationError, match=words):
        convert(GOLDEN / PLAIN, tmp_path / "out", verifier)
    assert entries(tmp_path) == []


def test_validation_finds_a_rope_that_is_not_the_sources(
    tmp_path: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speculators.models.eagle import EagleSpeculatorConfig

    initialise = EagleSpeculatorConfig.__post_init__

    def with_another_theta(self: EagleSpeculatorConfig, **kwargs: Any) -> None:
        initialise(self, **kwargs)
        self.layer.rope_parameters["rope_theta"] = 10000.0

    monkeypatch.setattr(EagleSpeculatorConfig, "__post_init__", with_another_theta)
    with pytest.raises(ValidationError, match="not what the source's tensors compute"):
        convert(GOLDEN / PLAIN, tmp_path / "out", verifier)
    assert entries(tmp_path) == []
