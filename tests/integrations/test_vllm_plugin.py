"""The plugin in versions of vLLM that it does not support, and the config that it gives to vLLM.

What it does in the real engine is tested by `make test-vllm`.
"""

import json
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers import GOLDEN_NAMES, config_of, source_tensors, stored_tensors
from speculators.errors import FormatError
from speculators.integrations.vllm.config import update_eagle
from speculators.integrations.vllm.plugin import ARCHITECTURE, MODELS, SUPPORTED_RELEASES, register

ALGORITHMS = "vllm.transformers_utils.configs.speculators.algos"
REGISTRY = "vllm.model_executor.models.registry"


class Registry:
    """Stands in for vLLM's ``ModelRegistry``."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, name: str, model: str) -> None:
        self.models[name] = model


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for vLLM, as far as the plugin uses it."""
    modules = {
        name: ModuleType(name)
        for module in (ALGORITHMS, REGISTRY)
        for name in (module.rsplit(".", n)[0] for n in range(module.count(".") + 1))
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm: Any = modules["vllm"]
    vllm.__version__ = f"{SUPPORTED_RELEASES[-1]}.0+cpu"
    algorithms: Any = modules[ALGORITHMS]
    algorithms.SUPPORTED_SPECULATORS_TYPES = {"eagle3": "their own"}
    registry: Any = modules[REGISTRY]
    registry.ModelRegistry = Registry()
    stand_in: ModuleType = vllm
    return stand_in


def registered() -> tuple[dict[str, Any], dict[str, str]]:
    algorithms, registry = (sys.modules[name] for name in (ALGORITHMS, REGISTRY))
    return algorithms.SUPPORTED_SPECULATORS_TYPES, registry.ModelRegistry.models


def test_vllm_finds_the_plugin() -> None:
    found = {point.name: point for point in entry_points(group="vllm.general_plugins")}
    assert found["speculators"].load() is register


@pytest.mark.usefixtures("vllm")
def test_a_known_release_is_taught(caplog: pytest.LogCaptureFixture) -> None:
    register()
    register()  # vLLM may do so, too
    assert registered() == ({"eagle3": "their own", "eagle": update_eagle}, MODELS)
    assert not caplog.records


def test_what_is_registered_is_there() -> None:
    """Check this without importing it, which works only within vLLM."""
    for model in MODELS.values():
        module, _, name = model.partition(":")
        file = Path(sys.modules[register.__module__].__file__ or "").with_name(
            module.rpartition(".")[2] + ".py"
        )
        assert f"class {name}(" in file.read_text()


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "0.3.2", "1.0.0", "dev", ""])
def test_it_steps_aside_in_an_unknown_release(
    vllm: ModuleType, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    vllm.__version__ = version  # type: ignore[attr-defined]
    register()
    assert registered() == ({"eagle3": "their own"}, {})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name.startswith("vllm.")
    assert f"it does not know vLLM {version}, only" in record.getMessage()


@pytest.mark.parametrize("gone", [ALGORITHMS, REGISTRY])
@pytest.mark.usefixtures("vllm")
def test_it_steps_aside_in_a_release_that_is_built_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    monkeypatch.setitem(sys.modules, gone, None)
    register()
    (record,) = caplog.records
    assert "is not built as the release is" in record.getMessage()


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
