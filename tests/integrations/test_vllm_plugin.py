"""What the plugin does in releases of vLLM, and the config that it gives to vLLM.

What it does in the real engine is tested by `make test-vllm`.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import GOLDEN_NAMES, config_of, source_tensors, stored_tensors
from speculators.errors import FormatError
from speculators.integrations.vllm.config import cover_positions, update_eagle
from speculators.integrations.vllm.models import ARCHITECTURE, MODELS
from speculators.integrations.vllm.plugin import register
from vllm_stand_in import ALGORITHMS, LAYERS, REGISTRY, write_stand_in

Install = Callable[[str], Path]


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a stand-in for vLLM of a version, and returns its directory."""

    def install(version: str) -> Path:
        monkeypatch.syspath_prepend(str(tmp_path))
        return write_stand_in(tmp_path, version)

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def registered() -> tuple[dict[str, Any], dict[str, str]]:
    algorithms, registry = (
        import_module("vllm." + file.removesuffix(".py").replace("/", "."))
        for file in (ALGORITHMS, REGISTRY)
    )
    return algorithms.SUPPORTED_SPECULATORS_TYPES, registry.ModelRegistry.models


EVERYTHING = ({"eagle3": "their own", "eagle": update_eagle}, MODELS)
NOTHING: tuple[dict[str, Any], dict[str, str]] = ({"eagle3": "their own"}, {})


def test_vllm_finds_the_plugin() -> None:
    found = {point.name: point for point in entry_points(group="vllm.general_plugins")}
    assert found["speculators"].load() is register


@pytest.mark.parametrize("version", ["0.26.0", "0.29.0", "0.31.0", "0.32.0", "0.32.0+cpu"])
def test_a_tested_release_gets_everything_in_silence(
    vllm: Install, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    vllm(version)
    register()
    register()  # vLLM may do so, too
    assert registered() == EVERYTHING
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.30.0", "0.32.1", "0.33.0", "1.0.0", "dev", ""])
def test_another_release_of_the_same_parts_is_tried_with_one_warning(
    vllm: Install, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    vllm(version)
    register()
    register()
    assert registered() == EVERYTHING
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name.startswith("vllm.")
    assert f"was not tested with vLLM {version}. It goes on" in record.getMessage()
    assert "vLLM 0.26.0, 0.29.0, 0.31.0 and 0.32.0 are known to work" in record.getMessage()


def test_its_further_processes_do_not_repeat_the_warning(
    vllm: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    vllm("0.33.0")
    process = get_context("spawn").Process(target=register)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert capfd.readouterr() == ("", "")


def change(package: Path, file: str, old: str, new: str) -> None:
    source = (package / file).read_text()
    assert old in source
    (package / file).write_text(source.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        (ALGORITHMS, "SUPPORTED_", "KNOWN_", "algos.py: no SUPPORTED_SPECULATORS_TYPES"),
        (REGISTRY, "model_cls", "model", "_ModelRegistry.register_model has other parameters"),
        (LAYERS, "config=None", "config=None, *, cache", "LlamaDecoderLayer.__init__ has other"),
        (LAYERS, "inputs_embeds=None", "inputs_embeds", "EagleLlamaForCausalLM.forward has other"),
        (LAYERS, "hf_to_vllm_mapper", "mapper", "llama_eagle.py: no LlamaModel.hf_to_vllm_mapper"),
        (LAYERS, "def load_weights", "def load", "no EagleLlamaForCausalLM.load_weights"),
    ],
)
@pytest.mark.parametrize("version", ["0.32.0", "0.34.0"])
def test_it_steps_aside_where_a_part_is_another(
    vllm: Install,
    caplog: pytest.LogCaptureFixture,
    version: str,
    file: str,
    old: str,
    new: str,
    why: str,
) -> None:
    change(vllm(version), file, old, new)
    register()
    (record,) = caplog.records
    assert f"does nothing, since vLLM {version} differs from what it needs" in record.getMessage()
    assert why in record.getMessage()
    assert (
        "vLLM 0.26.0, 0.29.0, 0.31.0 and 0.32.0 are known to work (pip install vllm==0.32.0)"
        in record.getMessage()
    )
    assert "vllm.transformers_utils" not in sys.modules


def test_it_steps_aside_where_a_module_is_gone(
    vllm: Install, caplog: pytest.LogCaptureFixture
) -> None:
    (vllm("0.32.0") / LAYERS).unlink()
    register()
    (record,) = caplog.records
    assert "llama_eagle.py: no such module" in record.getMessage()
    assert registered() == NOTHING


def test_further_parameters_do_no_harm(vllm: Install, caplog: pytest.LogCaptureFixture) -> None:
    change(vllm("0.32.0"), LAYERS, "config=None", "config=None, cache=None, **more")
    register()
    assert registered() == EVERYTHING
    assert not caplog.records


def test_it_steps_aside_where_a_part_cannot_be_imported(
    vllm: Install, caplog: pytest.LogCaptureFixture
) -> None:
    file = vllm("0.32.0") / REGISTRY
    file.write_text("from vllm import nothing\n" + file.read_text())
    register()
    (record,) = caplog.records
    assert "cannot import name 'nothing' from 'vllm'" in record.getMessage()


def key(architecture: str | None, **values: Any) -> str:
    """The part of the compile cache's key that comes from speculation, in a vLLM up to 0.29."""
    config = import_module("vllm.config").SpeculativeConfig()
    if architecture:
        config.draft_model_config = import_module("vllm.config").ModelConfig()
        config.draft_model_config.architecture = architecture
        config.draft_model_config.values = values
    found: str = config.compute_hash()
    return found


@pytest.mark.parametrize("architecture", MODELS)
def test_the_draft_s_config_is_in_the_key_of_compiled_graphs(
    vllm: Install, architecture: str
) -> None:
    vllm("0.26.0")
    before = key(architecture, rms_norm_eps=1e-5)
    assert key(architecture, rms_norm_eps=0.5) == before  # otherwise there is nothing to mend
    register()
    register()
    assert key(architecture, rms_norm_eps=1e-5) != before
    assert key(architecture, rms_norm_eps=1e-5) == key(architecture, rms_norm_eps=1e-5)
    assert key(architecture, rms_norm_eps=1e-5) != key(architecture, rms_norm_eps=0.5)


@pytest.mark.parametrize("architecture", [None, "Eagle3LlamaForCausalLM"])
def test_the_key_of_other_drafts_is_vllm_s_own(vllm: Install, architecture: str | None) -> None:
    vllm("0.26.0")
    before = key(architecture)
    register()
    assert key(architecture) == before


def test_what_is_registered_is_there() -> None:
    """Check this without importing it, which works only within vLLM."""
    for model in MODELS.values():
        module, _, name = model.partition(":")
        file = Path(sys.modules[register.__module__].__file__ or "").with_name(
            module.rpartition(".")[2] + ".py"
        )
        assert f"class {name}(" in file.read_text()


def test_it_is_harmless_without_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert not caplog.records


def vllm_s_config(config: dict[str, Any]) -> dict[str, Any]:
    """Do as vLLM does: pass the layer's config, which is changed in place."""
    layer: dict[str, Any] = config.get("transformer_layer_config", {})
    update_eagle(config, layer)
    return layer


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_config_says_what_the_tensors_are(converted: dict[str, Path], name: str) -> None:
    config = vllm_s_config(config_of(converted[name]))
    stored = {key: tuple(tensor.shape) for key, tensor in stored_tensors(converted[name]).items()}
    assert config["tensor_shapes"] == stored
    assert config["fusion_bias"] == ("fc.bias" in stored)
    assert config["layernorms"] == ("hidden_layernorm.weight" in stored)
    assert config["qkv_bias"] == ("layers.0.self_attn.q_proj.bias" in stored)
    assert config["attention_bias"] is False  # o_proj has none
    assert config["architectures"] == [ARCHITECTURE]
    assert (config["num_attention_heads"], config["head_dim"]) == (4, 16)


def test_the_embedding_may_be_missing(converted: dict[str, Path]) -> None:
    shapes = vllm_s_config(config_of(converted["rope_linear"]))["tensor_shapes"]
    assert (
        shapes["embed_tokens.weight"] == source_tensors("rope_linear")["embed_tokens.weight"].shape
    )


def test_rope_is_the_draft_s_own(converted: dict[str, Path]) -> None:
    linear = vllm_s_config(config_of(converted["rope_linear"]))
    assert linear["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 10000.0,
    }
    plain = vllm_s_config(config_of(converted["llama31_gqa_nobias"]))
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(("max_model_len", "expected"), [(8192, 8192), (1024, 2048)])
def test_the_table_of_rotary_embeddings_covers_the_served_context(
    converted: dict[str, Path], max_model_len: int, expected: int
) -> None:
    config = vllm_s_config(config_of(converted["llama31_gqa_nobias"]))
    draft = SimpleNamespace(**config | {"max_position_embeddings": 2048})
    cover_positions(draft, max_model_len)
    assert draft.max_position_embeddings == expected


def test_an_older_config_is_filled_in(converted: dict[str, Path]) -> None:
    """0.1.0 to 0.3.0 wrote only what differs from transformers' defaults."""
    config = config_of(converted["llama31_gqa_nobias"])
    layer = config["transformer_layer_config"]
    config["transformer_layer_config"] = {
        key: layer[key] for key in ("hidden_size", "vocab_size", "num_attention_heads")
    } | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    found = vllm_s_config(config)
    assert (found["num_key_value_heads"], found["head_dim"]) == (4, 16)
    assert found["intermediate_size"] == 11008
    assert found["rope_parameters"]["rope_type"] == "linear"


def test_a_wrong_config_is_told(converted: dict[str, Path]) -> None:
    config = config_of(converted["rope_linear"])
    config["transformer_layer_config"]["hidden_size"] = "many"
    with pytest.raises(FormatError, match=r"key transformer_layer_config\.hidden_size"):
        vllm_s_config(config)


def test_an_activation_that_vllm_has_not_is_told(converted: dict[str, Path]) -> None:
    config = config_of(converted["rope_linear"])
    config["transformer_layer_config"]["hidden_act"] = "gelu"
    with pytest.raises(FormatError, match="activation is gelu"):
        vllm_s_config(config)


def test_the_config_can_be_sent_to_other_processes(converted: dict[str, Path]) -> None:
    assert json.dumps(vllm_s_config(config_of(converted["qwen2_qkv_bias"])))
