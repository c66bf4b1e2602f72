"""How vLLM's own functions read what is converted: which layers are causal, and how far they see.

Upstream's converted DFlash drafts run causally there. Only the functions that decide it are taken
from vLLM's files, so that a release can be tried without installing it: VLLM_SOURCES is a folder
that has a ``vllm`` in it, such as an unpacked wheel.
"""

import ast
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dflash import (
    Config,
    Edit,
    converted,
    deepspec,
    native,
    sliding,
    upstream,
    with_markov,
    write_draft,
)
from speculators.convert.export import export

WINDOW: dict[str, Any] = {"sliding_window": 4, "use_sliding_window": True}
ALL = sliding(True, True, True)


def nothing(tensors: Any) -> None:
    """Changes nothing."""


DRAFTS: dict[str, tuple[Config, Edit]] = {
    "full layers": (native(), nothing),
    "causal by dflash_config": (native(nested={"causal": True}), nothing),
    "causal": (native(is_causal=True), nothing),
    "sliding": (native(layer_types=ALL, **WINDOW), nothing),
    "sliding, bidirectional": (native(layer_types=ALL, is_causal=False, **WINDOW), nothing),
    "mixed, bidirectional": (
        native(layer_types=sliding(True, False, True), is_causal=False, **WINDOW),
        nothing,
    ),
    "use_swa": (native(nested={"use_swa": True, "swa_window_size": 4}), nothing),
    "DSpark": (deepspec(), with_markov()),
    "DSpark, mixed": (deepspec(layer_types=sliding(True, False, True), **WINDOW), with_markov()),
    "DSpark, causal": (deepspec(is_causal=True), with_markov()),
    "DSpark, sliding, bidirectional": (
        deepspec(layer_types=ALL, is_causal=False, **WINDOW),
        with_markov(),
    ),
}


def sources() -> Path:
    """The folder of vLLM's files."""
    given = os.environ.get("VLLM_SOURCES")
    if given:
        return Path(given) / "vllm"
    found = importlib.util.find_spec("vllm")
    assert found
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="module")
def vllm() -> SimpleNamespace:
    """The functions that decide how a draft's layers see a block, from vLLM's files."""
    attention = (sources() / "model_executor/models/qwen3_dflash.py").read_text()
    wanted = {"_dflash_layer_causal", "_resolve_layer_attention", "_SLIDING_ATTENTION"}
    parts = [
        node
        for node in ast.parse(attention).body
        if getattr(node, "name", None) in wanted
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted)
    ]
    assert len(parts) == len(wanted)
    names: dict[str, Any] = {
        "Qwen3Config": Any,
        "get_current_vllm_config": lambda: SimpleNamespace(use_v2_model_runner=True),
    }
    exec(compile(ast.Module(parts, []), "qwen3_dflash.py", "exec"), names)
    algorithms = (sources() / "transformers_utils/configs/speculators/algos.py").read_text()
    exec(compile(algorithms, "algos.py", "exec"), names)
    return SimpleNamespace(**names)


def read_by_vllm(vllm: SimpleNamespace, directory: Path) -> list[tuple[int | None, bool]]:
    """The window of each layer, and whether it is causal, as vLLM reads a directory."""
    config = json.loads((directory / "config.json").read_text())
    kind = config.get("speculators_model_type")
    if kind is not None:
        flat = config["transformer_layer_config"]
        vllm.SUPPORTED_SPECULATORS_TYPES[kind](config_dict=config, pre_trained_config=flat)
        config = flat
    read = SimpleNamespace(**config)
    return [vllm._resolve_layer_attention(read, layer) for layer in range(read.num_hidden_layers)]


@pytest.mark.parametrize("name", DRAFTS)
def test_vllm_reads_the_same_of_all_layouts(
    vllm: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    source = write_draft(tmp_path / "source", *DRAFTS[name])
    expected = read_by_vllm(vllm, source)
    out = converted(source, tmp_path / "out")
    assert read_by_vllm(vllm, out) == expected
    assert read_by_vllm(vllm, export(out, tmp_path / "native", "vllm")) == expected


def test_upstreams_conversion_is_read_as_causal(vllm: SimpleNamespace, tmp_path: Path) -> None:
    """That this fails is why there is an option: ours is not."""
    source = write_draft(tmp_path / "source", upstream())
    assert read_by_vllm(vllm, source) == [(None, True)] * 3
    out = converted(source, tmp_path / "out", causal=False)
    assert read_by_vllm(vllm, out) == [(None, False)] * 3


@pytest.mark.parametrize("name", ["full layers", "DSpark"])
def test_vllm_reads_the_same_layers_and_mask(
    vllm: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    out = converted(write_draft(tmp_path / "source", *DRAFTS[name]), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    flat = config["transformer_layer_config"]
    kind = config["speculators_model_type"]
    vllm.SUPPORTED_SPECULATORS_TYPES[kind](config_dict=config, pre_trained_config=flat)
    assert flat["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
    said = flat["dflash_config"] if kind == "dflash" else flat
    assert (said["target_layer_ids"], said["mask_token_id"]) == ([1, 3, 5], 319)
    assert said["sample_from_anchor"] is (kind == "dspark")
