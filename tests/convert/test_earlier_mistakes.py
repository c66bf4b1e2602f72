"""Mistakes of an earlier converter, with a test for each that shows that it is not made here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (
    HIDDEN,
    PLAIN,
    TOLERANCE,
    VOCABULARY,
    Edit,
    Tensors,
    config_of,
    entries,
    golden_vectors,
    largest_difference,
    save_quietly,
    source_config,
    source_tensors,
    stored_tensors,
    tiny_llama,
    write_checkpoint,
    write_shards,
)
from plain_draft import plain_draft
from speculators.convert.eagle import EagleConverter
from speculators.errors import (
    CheckpointError,
    ConversionError,
    OutputError,
    UnsafeCheckpointError,
    ValidationError,
    VerifierError,
)
from speculators.models.eagle import EagleSpeculator

convert = EagleConverter().convert


def cast(dtype: torch.dtype) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return edit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_the_dtype_stays(
    tmp_path: Path, verifier: Path, dtype: torch.dtype, container: str
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=cast(dtype), container=container)
    out = convert(source, tmp_path / "out", verifier)
    stored = stored_tensors(out)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(stored[name], t.to(dtype)) for name, t in source_tensors().items())
    assert config_of(out)["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert EagleSpeculator.from_pretrained(out).fc.weight.dtype == dtype


def test_each_tensor_of_a_mixed_checkpoint_keeps_its_dtype(tmp_path: Path, verifier: Path) -> None:
    def mix(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float16 if "mlp" in name else torch.bfloat16)

    out = convert(write_checkpoint(tmp_path / "source", edit=mix), tmp_path / "out", verifier)
    for name, tensor in stored_tensors(out).items():
        assert tensor.dtype == (torch.float16 if "mlp" in name else torch.bfloat16)


@pytest.mark.parametrize(
    "name", [name for name in source_tensors() if name != "embed_tokens.weight"]
)
@pytest.mark.parametrize("validate", [True, False])
def test_a_missing_tensor_is_not_invented(
    tmp_path: Path, verifier: Path, name: str, validate: bool
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=lambda tensors: tensors.pop(name))
    with pytest.raises(ConversionError, match=name):
        convert(source, tmp_path / "out", verifier, validate=validate)
    assert entries(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


def test_a_checkpoint_with_none_of_the_names_is_refused(tmp_path: Path, verifier: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"encoder.{name}"] = tensors.pop(name)

    source = write_checkpoint(tmp_path / "source", edit=rename)
    with pytest.raises(ConversionError, match=r"not a checkpoint of a known kind.*encoder\."):
        convert(source, tmp_path / "out", verifier)


@pytest.mark.parametrize("flag", ["fusion_bias", "layernorms"])
@pytest.mark.parametrize("validate", [True, False])
def test_a_flag_does_not_invent_a_feature(
    tmp_path: Path, verifier: Path, flag: str, validate: bool
) -> None:
    source = write_checkpoint(tmp_path / "source")
    flags: dict[str, Any] = {flag: True}
    with pytest.raises(ConversionError, match=flag):
        convert(source, tmp_path / "out", verifier, validate=validate, **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "flag"), [("vicuna_default_bias", "fusion_bias"), ("ttt_layernorms", "layernorms")]
)
@pytest.mark.parametrize("said", [True, False])
def test_a_feature_is_there_with_and_without_its_flag(
    tmp_path: Path, verifiers: dict[str, Path], name: str, flag: str, said: bool
) -> None:
    source = write_checkpoint(tmp_path / "source", name=name)
    flags: dict[str, Any] = {flag: said}
    out = convert(source, tmp_path / "out", verifiers[name], **flags)
    assert config_of(out)[flag] is True
    assert len(stored_tensors(out)) == len(source_tensors(name))


def test_biases_of_q_k_and_v_are_kept(converted: dict[str, Path]) -> None:
    stored, source = stored_tensors(converted["qwen2_qkv_bias"]), source_tensors("qwen2_qkv_bias")
    biases = [name for name in source if name.endswith("proj.bias")]
    assert len(biases) == 3
    assert all(torch.equal(stored[name], source[name]) for name in biases)


def test_a_second_layer_is_refused(tmp_path: Path, verifier: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["layers.1.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].clone()

    source = write_checkpoint(tmp_path / "source", edit=add)
    with pytest.raises(ConversionError, match=r"several layers.*layers\.1\.mlp\.up_proj"):
        convert(source, tmp_path / "out", verifier)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.up_proj.weight_scale",
        "layers.0.mlp.up_proj.qweight",
        "layers.0.self_attn.q_proj.scales",
        "fc.weight.absmax",
    ],
)
def test_quantization_scales_are_refused(tmp_path: Path, verifier: Path, name: str) -> None:
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.update({name: torch.ones(1)})
    )
    with pytest.raises(ConversionError, match=r"quantized.*" + name.replace(".", r"\.")):
        convert(source, tmp_path / "out", verifier)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("name", ["fc.weight", "lm_head.weight"])
def test_a_tensor_of_another_type_is_refused(
    tmp_path: Path, verifier: Path, dtype: torch.dtype, name: str
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = golden_vectors(PLAIN)["lm_head.weight"]
        tensors[name] = tensors[name].to(dtype)

    source = write_checkpoint(tmp_path / "source", edit=edit)
    with pytest.raises(ConversionError, match=f"{name} has the type"):
        convert(source, tmp_path / "out", verifier)


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


def test_a_head_that_is_not_the_verifiers_is_refused(tmp_path: Path, verifier: Path) -> None:
    head = golden_vectors(PLAIN)["lm_head.weight"].clone()
    head[17, 3] += 0.5
    source = write_checkpoint(
        tmp_path / "source", edit=lambda tensors: tensors.update({"lm_head.weight": head})
    )
    with pytest.raises(ValidationError, match=r"lm_head\.weight"):
        convert(source, tmp_path / "out", verifier)
    assert entries(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


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


def test_the_drafts_own_embedding_is_kept_and_used(converted: dict[str, Path]) -> None:
    """The verifier has another embedding, and the golden logits were computed with the draft's."""
    own = source_tensors()["embed_tokens.weight"]
    assert torch.equal(stored_tensors(converted[PLAIN])["embed_tokens.weight"], own)
    model = EagleSpeculator.from_pretrained(converted[PLAIN])
    embedding = tiny_llama().get_input_embeddings()
    assert isinstance(embedding.weight, torch.Tensor)
    assert not torch.equal(embedding.weight, own)
    g = golden_vectors(PLAIN)
    logits = model(g["input_ids"], g["hidden_states"]).logits
    assert largest_difference(logits, g["logits"]) < TOLERANCE
    model.attach_verifier(tiny_llama(g["lm_head.weight"]))
    logits = model(g["input_ids"], g["hidden_states"]).logits
    assert largest_difference(logits, g["logits"]) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_causal_without_a_mask(converted: dict[str, Path], attention: str) -> None:
    model = EagleSpeculator.from_pretrained(converted[PLAIN], attn_implementation=attention)
    g = golden_vectors(PLAIN)
    ids, states = g["input_ids"].clone(), g["hidden_states"].clone()
    before = model(ids, states).logits
    ids[:, 12:] = 5
    states[:, 12:] = 100.0
    after = model(ids, states).logits
    assert largest_difference(after[:, :12], before[:, :12]) < TOLERANCE
    assert largest_difference(after[:, 12:], before[:, 12:]) > 1


def test_from_pretrained_takes_a_verifier(converted: dict[str, Path], verifier: Path) -> None:
    g = golden_vectors(PLAIN)
    for given in (tiny_llama(g["lm_head.weight"]), verifier, str(verifier)):
        model = EagleSpeculator.from_pretrained(converted[PLAIN], verifier=given)
        assert model.verifier is not None
        logits = model(g["input_ids"], g["hidden_states"]).logits
        assert largest_difference(logits, g["logits"]) < TOLERANCE


def test_a_bfloat16_verifier_serves_a_float32_draft(converted: dict[str, Path]) -> None:
    g = golden_vectors(PLAIN)
    verifier = tiny_llama(g["lm_head.weight"]).bfloat16()
    model = EagleSpeculator.from_pretrained(converted[PLAIN], verifier=verifier)
    output = model(g["input_ids"], g["hidden_states"].bfloat16())
    assert model.fc.weight.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    # States, head and product are rounded once each; see test_golden for the bound.
    assert largest_difference(output.logits, g["logits"]) < 2**-5 * g["logits"].abs().max()


ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 500000.0},
    "no theta": {"rope_theta": None},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic, within": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, beyond": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 1000,
    },
    "as transformers 5 writes it": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 70000.0},
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_the_draft_runs_with_its_own_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Compare over 2048 positions, with a verifier that has another RoPE."""
    scaled = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
    verifier = save_quietly(tiny_llama(rope_parameters=scaled), tmp_path / "verifier")
    config = {"max_position_embeddings": 2048, **rope}
    source = write_checkpoint(tmp_path / "source", config=config)
    model = EagleSpeculator.from_pretrained(convert(source, tmp_path / "out", verifier))

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2048,), generator=generator)
    states = torch.randn(2048, HIDDEN, generator=generator)
    known = {k: v for k, v in (source_config() | config).items() if v is not None}
    known = known | {k: v for k, v in known.get("rope_parameters", {}).items() if k == "rope_theta"}
    expected = plain_draft(source_tensors(), known, ids, states)
    with torch.inference_mode():
        found = model(ids[None], states[None]).last_hidden_state[0]
    # Angles up to 2048 are off by 2048 * 2**-24 in float32, and the error propagates.
    assert largest_difference(found, expected) < 5e-3
    assert (found.double() - expected).abs().mean() < TOLERANCE
    wrong = plain_draft(
        source_tensors(), known | {"rope_theta": 77.0, "rope_scaling": None}, ids, states
    )
    assert largest_difference(found, wrong) > 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 128}, r"hidden size is 64, the verifier's is 128"),
        ({"vocab_size": 321}, r"vocabulary is 320, the verifier's is 321"),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_a_verifier_of_other_sizes_is_refused(
    tmp_path: Path, sizes: dict[str, Any], words: str, validate: bool
) -> None:
    verifier = save_quietly(tiny_llama(**sizes), tmp_path / "verifier")
    source = write_checkpoint(tmp_path / "source")
    with pytest.raises(VerifierError, match=words):
        convert(source, tmp_path / "out", verifier, validate=validate)
    assert not (tmp_path / "out").exists()


def spoil(name: str, index: Any, value: float) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[name][index] = value

    return edit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("fc.weight", (0, 0)),
        ("layers.0.mlp.down_proj.weight", (63, 175)),
        ("embed_tokens.weight", 319),
        ("embed_tokens.weight", (0, 5)),
    ],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, verifier: Path, name: str, index: Any, value: float
) -> None:
    source = write_checkpoint(tmp_path / "source", edit=spoil(name, index, value))
    with pytest.raises(ValidationError, match=rf"{name} has values that are not finite"):
        convert(source, tmp_path / "out", verifier)
    assert entries(tmp_path) == ["source", "source/config.json", "source/model.safetensors"]


def test_a_verifier_with_nans_in_its_head_is_blamed_itself(tmp_path: Path) -> None:
    head = golden_vectors(PLAIN)["lm_head.weight"].clone()
    head[3] = math.nan
    verifier = save_quietly(tiny_llama(head), tmp_path / "verifier")
    with pytest.raises(ValidationError, match=r"the verifier .* is damaged"):
        convert(write_checkpoint(tmp_path / "source"), tmp_path / "out", verifier)
    assert not (tmp_path / "out").exists()


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


def test_an_existing_directory_is_not_merged_into(tmp_path: Path, verifier: Path) -> None:
    source, out = write_checkpoint(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            convert(source, out, verifier, overwrite=overwrite)
        assert entries(out) == ["notes.txt"]


SIZE = (Path(__file__).parent.parent / "golden" / PLAIN / "model.safetensors").stat().st_size


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 1500, SIZE // 2, -64, -8, -1])
def test_a_truncated_file_is_told_in_a_sentence(
    tmp_path: Path, verifier: Path, container: str, kept: int
) -> None:
    source = write_checkpoint(tmp_path / "source", container=container)
    file = source / container
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=container) as caught:
        convert(source, tmp_path / "out", verifier, validate=False)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "out").exists()


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, verifier: Path, legacy: bool) -> None:
    source, canary = write_checkpoint(tmp_path / "source"), tmp_path / "canary"
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save(
        source_tensors() | {"x": Malicious(canary)},
        file,
        _use_new_zipfile_serialization=not legacy,
    )
    torch.load(file, weights_only=False)
    assert canary.exists()  # the pickle does harm if it is run
    canary.unlink()
    with pytest.raises(UnsafeCheckpointError):
        convert(source, tmp_path / "out", verifier)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


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
