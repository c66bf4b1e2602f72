"""What is said of Medusa heads; tests_vllm/test_medusa.py serves them with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from speculators.inspection.checkpoint import inspect_checkpoint
from speculators.inspection.findings import Finding

HIDDEN, VOCABULARY = 16, 40


def inspected(directory: Path, names: dict[str, tuple[int, ...]]) -> Finding:
    save_file(
        {name: torch.ones(shape) for name, shape in names.items()}, directory / "m.safetensors"
    )
    (directory / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    return inspect_checkpoint(directory / "m.safetensors")


def config_told(found: Finding) -> dict[str, Any]:
    """The config.json that vLLM needs, out of the note."""
    (note,) = (it for it in found.notes if "config.json has to be" in it)
    told: dict[str, Any] = json.loads(note[note.index("{") : note.index("}") + 1])
    return told


def heads(layer: str, last: str, *, biased: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(2):
        for number in range(3):
            name = layer.format(head=head, number=number)
            shapes[f"{name}.weight"] = (HIDDEN, HIDDEN)
            if biased:
                shapes[f"{name}.bias"] = (HIDDEN,)
        shapes[last.format(head=head)] = (VOCABULARY, HIDDEN)
    return shapes


@pytest.mark.parametrize(
    ("layer", "last"),
    [
        ("{head}.{number}.linear", "{head}.3.weight"),
        ("medusa_heads.{head}.{number}.linear", "medusa_heads.{head}.3.weight"),
        ("blocks.{head}.layers.{number}", "lm_heads.{head}.weight"),
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_what_vllm_needs_is_told(tmp_path: Path, layer: str, last: str, biased: bool) -> None:
    found = inspected(tmp_path, heads(layer, last, biased=biased))
    assert config_told(found) == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": 2,
        "num_hidden_layers": 3,
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        **({"medusa_fc_bias": True} if biased else {}),
    }
    assert [(it.engine, it.until) for it in found.serving or ()] == [
        ("vLLM", "0.32"),
        ("TensorRT-LLM", "1.3.0rc20"),
    ]


def test_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    names = heads("blocks.{head}.layers.{number}", "lm_heads.{head}.weight") | {"token_map": (8,)}
    assert config_told(inspected(tmp_path, names))["truncated_vocab_size"] == 8


def test_names_that_vllm_skips(tmp_path: Path) -> None:
    """ModelOpt's: vLLM would say nothing, and draft with heads that nobody trained."""
    layer = "medusa_heads.{head}.medusa_layers.{number}.linear"
    found = inspected(tmp_path, heads(layer, "medusa_heads.{head}.lm_head.weight"))
    assert [it.engine for it in found.serving or ()] == ["TensorRT-LLM"]
    assert not [it for it in found.notes if "vLLM" in it]
    assert "vLLM" not in (found.conversion.why_not or "").partition("It is served by")[2]
