"""The model: loading, saving, its verifier, and the layout of earlier versions."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from helpers import (
    GOLDEN,
    GOLDEN_NAMES,
    HIDDEN,
    PLAIN,
    TOLERANCE,
    VOCABULARY,
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
)
from speculators.convert.eagle import EagleConverter
from speculators.errors import CheckpointError, FormatError, VerifierError
from speculators.models.eagle import EagleOutput, EagleSpeculator, EagleSpeculatorConfig

every_golden = pytest.mark.parametrize("name", GOLDEN_NAMES)


def logits_of(model: EagleSpeculator, name: str = PLAIN) -> Tensor:
    g = golden_vectors(name)
    with torch.inference_mode():
        output = model(g["input_ids"], g["hidden_states"])
    assert isinstance(output, EagleOutput)
    assert output.logits is not None
    return output.logits


def is_golden(model: EagleSpeculator, name: str = PLAIN) -> bool:
    return largest_difference(logits_of(model, name), golden_vectors(name)["logits"]) < TOLERANCE


@pytest.fixture
def model(converted: dict[str, Path]) -> EagleSpeculator:
    return EagleSpeculator.from_pretrained(converted[PLAIN])


@pytest.fixture(scope="module")
def without_embedding(tmp_path_factory: pytest.TempPathFactory, own_verifier: Path) -> Path:
    """A converted draft that takes its embedding from the verifier."""
    root = tmp_path_factory.mktemp("borrowing")
    source = write_checkpoint(root / "source", edit=lambda t: t.pop("embed_tokens.weight"))
    return EagleConverter().convert(source, root / "out", own_verifier)


# Configs


@every_golden
def test_a_config_survives_a_round_trip(
    converted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config = EagleSpeculatorConfig.from_pretrained(converted[name])
    save_quietly(config, tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(converted[name])
    again = EagleSpeculatorConfig.from_pretrained(tmp_path / "saved")
    assert again.to_dict() == config.to_dict() == config_of(converted[name])


def test_keys_that_this_version_does_not_know_survive(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(converted[PLAIN], changed)
    config = config_of(changed)
    config["speculators_config"]["trained_on"] = "tea leaves"
    config["speculators_config"]["proposal_methods"][0]["temperature"] = 0.5
    config["transformer_layer_config"]["attention_dropout"] = 0.25
    (changed / "config.json").write_text(json.dumps(config))
    save_quietly(EagleSpeculator.from_pretrained(changed), tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config


def test_a_config_made_from_parts() -> None:
    config = EagleSpeculatorConfig(
        transformer_layer_config={
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "vocab_size": 99,
        },
        layernorms=True,
        fusion_bias=True,
    )
    assert config.transformer_layer_architecture == "Qwen2DecoderLayer"
    assert config.layer.num_hidden_layers == 1
    assert config.get_text_config() is config.layer
    assert config.to_dict()["transformer_layer_config"]["hidden_size"] == 32


# Saving and loading


@every_golden
def test_saved_and_loaded_again_it_is_the_same(
    converted: dict[str, Path], tmp_path: Path, name: str
) -> None:
    saved = save_quietly(EagleSpeculator.from_pretrained(converted[name]), tmp_path / "saved")
    assert config_of(saved) == config_of(converted[name])
    assert entries(saved) == ["README.md", "config.json", "model.safetensors"]
    expected, stored = stored_tensors(converted[name]), stored_tensors(saved)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    assert is_golden(EagleSpeculator.from_pretrained(saved), name)


@pytest.mark.parametrize("attach", [True, False])
def test_what_is_the_verifiers_is_not_saved(
    without_embedding: Path, own_verifier: Path, tmp_path: Path, attach: bool
) -> None:
    model = EagleSpeculator.from_pretrained(without_embedding)
    if attach:
        model.attach_verifier(own_verifier)
    saved = save_quietly(model, tmp_path / "saved")
    assert stored_tensors(saved).keys() == source_tensors().keys() - {"embed_tokens.weight"}
    assert is_golden(EagleSpeculator.from_pretrained(saved))


def test_bfloat16_is_saved_as_such(converted: dict[str, Path], tmp_path: Path) -> None:
    model = EagleSpeculator.from_pretrained(converted[PLAIN], dtype=torch.bfloat16)
    saved = save_quietly(model, tmp_path / "saved")
    assert config_of(saved)["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in stored_tensors(saved).values()} == {torch.bfloat16}
    assert EagleSpeculator.from_pretrained(saved).fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("as_str", [True, False])
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dtype", torch.bfloat16, torch.bfloat16),
        ("dtype", "float16", torch.float16),
        ("dtype", "auto", torch.float32),
        ("torch_dtype", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dtype_asked_for(
    converted: dict[str, Path], key: str, value: Any, expected: torch.dtype, as_str: bool
) -> None:
    where = str(converted[PLAIN]) if as_str else converted[PLAIN]
    model = EagleSpeculator.from_pretrained(where, **{key: value})
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert logits_of(model).dtype == expected


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(
    converted: dict[str, Path], without_embedding: Path, device_map: str | dict[str, str]
) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for device_map")
    for directory in (converted[PLAIN], without_embedding):
        model = EagleSpeculator.from_pretrained(directory, device_map=device_map)
        assert is_golden(model)


def test_a_verifier_is_attached_by_path_without_device_map(
    model: EagleSpeculator, verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``device_map`` would need a package that is not among the dependencies."""
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", bool)
    model.attach_verifier(verifier)
    assert is_golden(model)


def test_nothing_is_left_on_the_meta_device(converted: dict[str, Path]) -> None:
    model = EagleSpeculator.from_pretrained(converted["ttt_layernorms"])
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_a_model_loads_in_evaluation_mode(model: EagleSpeculator) -> None:
    assert not model.training


def test_a_copy_computes_the_same(model: EagleSpeculator) -> None:
    assert is_golden(copy.deepcopy(model))


# The verifier


def test_attach_takes_a_model_and_shares_it(model: EagleSpeculator) -> None:
    verifier = tiny_llama(golden_vectors(PLAIN)["lm_head.weight"])
    assert model.attach_verifier(verifier) is verifier
    assert model.verifier is verifier
    assert model.get_output_embeddings() is verifier.lm_head
    assert is_golden(model)
    with torch.no_grad():
        verifier.get_parameter("lm_head.weight").mul_(2)
    expected = 2 * golden_vectors(PLAIN)["logits"]
    assert largest_difference(logits_of(model), expected) < 2 * TOLERANCE


def test_from_pretrained_takes_a_verifier(converted: dict[str, Path], verifier: Path) -> None:
    g = golden_vectors(PLAIN)
    for given in (tiny_llama(g["lm_head.weight"]), verifier, str(verifier)):
        model = EagleSpeculator.from_pretrained(converted[PLAIN], verifier=given)
        assert model.verifier is not None
        logits = model(g["input_ids"], g["hidden_states"]).logits
        assert largest_difference(logits, g["logits"]) < TOLERANCE


def test_a_verifier_that_lacks_weights_is_refused(
    converted: dict[str, Path], verifier: Path, tmp_path: Path
) -> None:
    """transformers would give it random ones, and only warn."""
    shutil.copytree(verifier, tmp_path / "verifier")
    tensors = load_file(tmp_path / "verifier" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "verifier" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifierError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight; give"):
        EagleSpeculator.from_pretrained(
            next(iter(converted.values())), verifier=tmp_path / "verifier"
        )


def test_a_bfloat16_verifier_serves_a_float32_draft(converted: dict[str, Path]) -> None:
    g = golden_vectors(PLAIN)
    verifier = tiny_llama(g["lm_head.weight"]).bfloat16()
    model = EagleSpeculator.from_pretrained(converted[PLAIN], verifier=verifier)
    output = model(g["input_ids"], g["hidden_states"].bfloat16())
    assert model.fc.weight.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    # States, head and product are rounded once each; see test_golden for the bound.
    assert largest_difference(output.logits, g["logits"]) < 2**-5 * g["logits"].abs().max()


@pytest.mark.parametrize("kind", [str, Path])
def test_attach_takes_a_path(
    model: EagleSpeculator, verifier: Path, kind: Callable[[Path], str | Path]
) -> None:
    attached = model.attach_verifier(kind(verifier))
    assert type(attached).__name__ == "LlamaForCausalLM"
    assert model.verifier is attached
    assert is_golden(model)


def test_an_attached_embedding_is_shared(without_embedding: Path, own_verifier: Path) -> None:
    model = EagleSpeculator.from_pretrained(without_embedding)
    borrowed = model.get_input_embeddings()
    attached = model.attach_verifier(own_verifier)
    assert model.get_input_embeddings() is attached.get_input_embeddings()
    assert model.get_input_embeddings() is not borrowed
    assert model.borrowed_head is None
    assert model.borrowed_embedding is None
    assert is_golden(model)


def with_a_scaled_embedding() -> PreTrainedModel:
    """Transformers' module of Gemma multiplies its rows."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, intermediate_size=64
    )
    model = Gemma3ForCausalLM(config)
    assert model.get_input_embeddings().embed_scale == 8
    return model


def with_a_biased_head() -> PreTrainedModel:
    config = PhiConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4
    )
    model = PhiForCausalLM(config)
    model.lm_head.bias.data.normal_()
    return model


@pytest.mark.parametrize("kind", [with_a_scaled_embedding, with_a_biased_head])
def test_a_draft_takes_what_its_verifiers_file_holds(
    tmp_path: Path, kind: Callable[[], PreTrainedModel]
) -> None:
    """With its verifier attached it computes as from its directory alone."""
    torch.manual_seed(1)
    verifier = kind().eval()
    save_quietly(verifier, tmp_path / "verifier")
    source = write_checkpoint(tmp_path / "source", edit=lambda it: it.pop("embed_tokens.weight"))
    out = EagleConverter().convert(source, tmp_path / "out", tmp_path / "verifier")
    model = EagleSpeculator.from_pretrained(out)
    expected = logits_of(model)
    model.attach_verifier(verifier)
    assert largest_difference(logits_of(model), expected) < TOLERANCE


def test_the_verifier_is_no_part_of_the_draft(model: EagleSpeculator) -> None:
    verifier = tiny_llama(golden_vectors(PLAIN)["lm_head.weight"])
    model.attach_verifier(verifier)
    theirs = {parameter.data_ptr() for parameter in verifier.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in model.parameters()}
    assert not any("verifier" in name or "borrowed" in name for name in model.state_dict())


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_casting_the_draft_does_not_touch_the_verifier(model: EagleSpeculator, cast: str) -> None:
    verifier = tiny_llama(golden_vectors(PLAIN)["lm_head.weight"])
    model.attach_verifier(verifier)
    if cast == "to":
        model.to(dtype=torch.float16)  # type: ignore[call-arg]
    else:
        getattr(model, cast)()
    assert model.fc.weight.dtype in {torch.bfloat16, torch.float16}
    assert {parameter.dtype for parameter in verifier.parameters()} == {torch.float32}
    assert logits_of(model).dtype == torch.float32


def test_training_the_draft_does_not_touch_the_verifier(model: EagleSpeculator) -> None:
    verifier = tiny_llama(golden_vectors(PLAIN)["lm_head.weight"]).eval()
    model.attach_verifier(verifier)
    model.train()
    assert not verifier.training


def test_after_detaching_there_are_no_logits(model: EagleSpeculator, verifier: Path) -> None:
    model.attach_verifier(verifier)
    model.detach_verifier()
    assert model.verifier is None
    with pytest.raises(VerifierError, match="Attach the verifier first"):
        logits_of(model)
    model.attach_verifier(verifier)
    assert is_golden(model)


def test_detaching_twice_is_no_error(model: EagleSpeculator) -> None:
    model.detach_verifier()
    model.detach_verifier()
    assert is_golden(model)  # the head that was read from the verifier's files is not attached


@pytest.mark.parametrize("sizes", [{"hidden_size": 128}, {"vocab_size": 100}])
@pytest.mark.parametrize("by_path", [True, False])
def test_a_verifier_that_does_not_fit_is_not_attached(
    model: EagleSpeculator, tmp_path: Path, sizes: dict[str, Any], by_path: bool
) -> None:
    other = tiny_llama(**sizes)
    given = save_quietly(other, tmp_path / "other") if by_path else other
    with pytest.raises(VerifierError, match="does not fit"):
        model.attach_verifier(given)
    assert model.verifier is None
    assert is_golden(model)


def test_a_verifier_without_a_head_is_not_attached(model: EagleSpeculator) -> None:
    with pytest.raises(VerifierError, match="has no output head"):
        model.attach_verifier(LlamaModel(tiny_llama().config))


def test_a_verifier_path_that_does_not_exist(model: EagleSpeculator, tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match="does not exist"):
        model.attach_verifier(tmp_path / "nowhere")


@pytest.mark.parametrize("keep_embedding", [True, False])
def test_where_the_verifier_is_gone_a_warning_and_later_an_error(
    tmp_path: Path, log: list[str], keep_embedding: bool
) -> None:
    g, tensors = golden_vectors(PLAIN), source_tensors()
    verifier = save_quietly(
        tiny_llama(g["lm_head.weight"], tensors["embed_tokens.weight"]), tmp_path / "verifier"
    )
    source = write_checkpoint(
        tmp_path / "source",
        edit=lambda t: None if keep_embedding else t.pop("embed_tokens.weight"),
    )
    out = EagleConverter().convert(source, tmp_path / "out", verifier)
    verifier.rename(tmp_path / "moved")
    log.clear()
    model = EagleSpeculator.from_pretrained(out)
    assert any(line.startswith("WARNING") and "no logits until" in line for line in log)
    with pytest.raises(VerifierError, match="Attach the verifier first"):
        logits_of(model)
    if keep_embedding:
        hidden = model.draft(g["input_ids"], g["hidden_states"]).last_hidden_state
        assert hidden is not None
        assert largest_difference(hidden, g["output_hidden"]) < TOLERANCE
    else:
        with pytest.raises(VerifierError, match="no embedding of its own"):
            model.draft(g["input_ids"], g["hidden_states"])
    model.attach_verifier(tmp_path / "moved")
    assert is_golden(model)


def test_an_embedding_of_its_own_is_used_instead_of_the_verifiers(
    converted: dict[str, Path],
) -> None:
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


# What is not a converted draft


@pytest.mark.parametrize("kind", [str, Path])
def test_an_unconverted_checkpoint_is_told_how_to_convert(
    tmp_path: Path, kind: Callable[[Path], str | Path]
) -> None:
    source = tmp_path / "my draft"
    shutil.copytree(GOLDEN / PLAIN, source)
    with pytest.raises(FormatError) as caught:
        EagleSpeculator.from_pretrained(kind(source))
    assert "Missing or incorrect speculators_model_type" in str(caught.value)
    assert f"speculators convert auto '{source}' " in str(caught.value)


def test_another_speculators_model_type(converted: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(converted[PLAIN], changed)
    config = config_of(changed) | {"speculators_model_type": "medusa"}
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"incorrect speculators_model_type.*found 'medusa'"):
        EagleSpeculator.from_pretrained(changed)


def test_an_argument_that_has_no_effect_is_told(converted: dict[str, Path], log: list[str]) -> None:
    EagleSpeculator.from_pretrained(converted[PLAIN], token="hf_abc", local_files_only=False)
    assert not any("has no effect" in line for line in log)
    EagleSpeculator.from_pretrained(converted[PLAIN], local_files_only=True)
    assert "WARNING The argument local_files_only has no effect here: use HF_HUB_OFFLINE" in log


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        EagleSpeculator.from_pretrained(tmp_path / "nowhere")


DAMAGES: dict[str, tuple[Callable[[Tensors, dict[str, Any]], object], str]] = {
    "a tensor is missing": (
        lambda t, c: t.pop("layers.0.mlp.up_proj.weight"),
        r"lacks layers\.0\.mlp\.up_proj\.weight",
    ),
    "an unknown tensor": (
        lambda t, c: t.update({"surprise": torch.ones(1)}),
        r"has unknown surprise",
    ),
    "a tensor of another shape": (
        lambda t, c: t.update({"fc.weight": torch.ones(64, 64)}),
        r"fc\.weight has the shape \(64, 64\)",
    ),
    "a transposed tensor": (
        lambda t, c: t.update({"fc.weight": t["fc.weight"].T.contiguous()}),
        r"fc\.weight has the shape \(128, 64\)",
    ),
    "a tensor of another type": (
        lambda t, c: t.update({"fc.weight": t["fc.weight"].to(torch.int8)}),
        r"fc\.weight has the type I8",
    ),
    "a bias that the config does not have": (
        lambda t, c: t.update({"fc.bias": torch.ones(64)}),
        r"has unknown fc\.bias",
    ),
    "a bias that the config has alone": (
        lambda t, c: c.update({"fusion_bias": True}),
        r"lacks fc\.bias",
    ),
    "layernorms that the config has alone": (
        lambda t, c: c.update({"layernorms": True}),
        r"lacks hidden_layernorm\.weight",
    ),
    "another size in the config": (
        lambda t, c: c["transformer_layer_config"].update({"intermediate_size": 177}),
        r"has the shape .* but by config\.json it should have",
    ),
    "no layer in the config": (
        lambda t, c: c.pop("transformer_layer_config"),
        r"key transformer_layer_config: Field required",
    ),
    "nonsense in the config": (
        lambda t, c: c["transformer_layer_config"].update({"hidden_size": -1}),
        r"key transformer_layer_config\.hidden_size: ",
    ),
    "an unknown layer": (
        lambda t, c: c["transformer_layer_config"].update({"model_type": "mamba"}),
        r"key transformer_layer_config\.model_type: ",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_directory_is_refused(
    converted: dict[str, Path],
    tmp_path: Path,
    damage: Callable[[Tensors, dict[str, Any]], object],
    words: str,
) -> None:
    tensors, config = stored_tensors(converted[PLAIN]), config_of(converted[PLAIN])
    damage(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=words):
        EagleSpeculator.from_pretrained(tmp_path)


# The layout of speculators 0.1.0 to 0.3.0


def legacy_name(name: str) -> str:
    """The name that those versions gave to a tensor of a research checkpoint."""
    names = {
        "embed_layernorm.weight": "embedding_layernorm.weight",
        "hidden_layernorm.weight": "transformer.input_layernorm.weight",
        "lm_head_layernorm.weight": "pre_lm_head_layernorm.weight",
    }
    if name in names:
        return names[name]
    return name.replace("fc.", "fusion_fc.", 1).replace("layers.0.", "transformer.", 1)


def write_legacy(root: Path, name: str, **config: Any) -> Path:
    tensors, source = source_tensors(name), source_config(name)
    head, embedding = golden_vectors(name)["lm_head.weight"], tensors.pop("embed_tokens.weight")
    verifier = save_quietly(tiny_llama(head, embedding), root / "verifier")
    defaults = {
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "num_hidden_layers": 1,
    }
    written = (  # noqa: SIM905
        "hidden_size intermediate_size max_position_embeddings num_attention_heads "
        "num_key_value_heads pad_token_id rms_norm_eps rope_theta vocab_size"
    ).split()
    layer = {
        key: source[key]
        for key in written
        if key in source and defaults.get(key, ...) != source[key]
    }
    layer["model_type"] = "llama"
    directory = root / "legacy"
    directory.mkdir()
    legacy = {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "speculators_model_type": "eagle",
        "speculators_version": "0.1.0",
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": layer,
        "layernorms": "embed_layernorm.weight" in tensors,
        "fusion_bias": "fc.bias" in tensors,
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
    (directory / "config.json").write_text(json.dumps(legacy | config))
    save_file({legacy_name(n): t for n, t in tensors.items()}, directory / "model.safetensors")
    return directory


LEGACY = ["llama31_gqa_nobias", "vicuna_default_bias", "ttt_layernorms"]


@pytest.mark.parametrize("name", LEGACY)
def test_the_older_layout_loads_and_computes_the_same(tmp_path: Path, name: str) -> None:
    directory = write_legacy(tmp_path, name)
    assert "fusion_fc.weight" in stored_tensors(directory)
    g = golden_vectors(name)
    model = EagleSpeculator.from_pretrained(directory)
    output = model(g["input_ids"], g["hidden_states"])
    assert largest_difference(output.last_hidden_state, g["output_hidden"]) < TOLERANCE
    assert largest_difference(output.logits, g["logits"]) < TOLERANCE


@pytest.mark.parametrize("name", LEGACY)
def test_the_older_layout_is_saved_in_the_new_one(tmp_path: Path, name: str) -> None:
    model = EagleSpeculator.from_pretrained(write_legacy(tmp_path, name))
    saved = save_quietly(model, tmp_path / "saved")
    names = {"embed_layernorm": "post_embedding_layernorm", "lm_head_layer": "pre_lm_head_layer"}
    expected = set()
    for source_name in source_tensors(name).keys() - {"embed_tokens.weight"}:
        new = source_name
        for old, current in names.items():
            new = new.replace(old, current) if new.startswith(old) else new
        expected.add(new)
    assert stored_tensors(saved).keys() == expected
    assert is_golden(EagleSpeculator.from_pretrained(saved), name)


def test_defaults_that_older_versions_left_out_are_llamas(tmp_path: Path) -> None:
    """The vicuna checkpoint's eps and theta are Llama's defaults, so they are not in the file."""
    directory = write_legacy(tmp_path, "vicuna_default_bias")
    layer = config_of(directory)["transformer_layer_config"]
    assert not {"rms_norm_eps", "rope_theta", "hidden_act", "num_key_value_heads"} & layer.keys()
    config = EagleSpeculatorConfig.from_pretrained(directory)
    assert config.layer.rms_norm_eps == 1e-6
    assert config.layer.num_key_value_heads == 4
    assert config.layer.rope_parameters["rope_theta"] == 10000.0


def test_a_damaged_directory_of_the_older_layout_is_refused(tmp_path: Path) -> None:
    directory = write_legacy(tmp_path, "vicuna_default_bias")
    tensors = stored_tensors(directory)
    del tensors["fusion_fc.bias"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(FormatError, match=r"lacks fc\.bias"):
        EagleSpeculator.from_pretrained(directory)


# From scratch, and training


def small_config(**features: Any) -> EagleSpeculatorConfig:
    return EagleSpeculatorConfig(
        transformer_layer_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        **features,
    )


@pytest.mark.parametrize("fusion_bias", [True, False])
@pytest.mark.parametrize("layernorms", [True, False])
def test_a_model_from_scratch(tmp_path: Path, fusion_bias: bool, layernorms: bool) -> None:
    model = EagleSpeculator(small_config(fusion_bias=fusion_bias, layernorms=layernorms))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (model.fc.bias is not None) == fusion_bias
    with pytest.raises(VerifierError, match="Attach the verifier first"):
        logits_of(model)
    verifier = tiny_llama()
    model.attach_verifier(verifier)
    before = logits_of(model)
    assert before.shape == (2, 24, VOCABULARY)

    saved = save_quietly(model, tmp_path / "saved")
    again = EagleSpeculator.from_pretrained(saved, verifier=verifier)
    assert torch.equal(logits_of(again), before)
    assert config_of(saved)["layernorms"] is layernorms


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_training_step_reaches_every_parameter_of_the_draft(
    converted: dict[str, Path], checkpointing: bool
) -> None:
    name = "ttt_layernorms"
    g = golden_vectors(name)
    model = EagleSpeculator.from_pretrained(
        converted[name], verifier=tiny_llama(g["lm_head.weight"])
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        logits = model(g["input_ids"], g["hidden_states"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), g["input_ids"][:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert model.verifier is not None
    assert torch.equal(model.verifier.get_output_embeddings().weight, g["lm_head.weight"])


def test_a_borrowed_head_is_not_trained(model: EagleSpeculator) -> None:
    head = model.get_output_embeddings()
    assert head is not None
    assert not head.weight.requires_grad
    logits = model(golden_vectors(PLAIN)["input_ids"], golden_vectors(PLAIN)["hidden_states"])
    logits.logits.sum().backward()
    assert head.weight.grad is None
    assert model.fc.weight.grad is not None
