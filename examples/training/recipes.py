"""The ways in which drafts are trained and published."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Recipe:
    """One way of training and publishing a draft."""

    family: str
    """``eagle1``, ``eagle3`` or ``dflash``: what is computed."""
    dtype: torch.dtype
    file: str = "model.safetensors"
    steps: int = 1
    """How many tokens deep a draft of EAGLE is trained on its own outputs."""
    bias: bool = False
    layernorms: bool = False
    eagle31: bool = False
    """For EAGLE-3: with the norms of EAGLE-3.1."""
    config: tuple[tuple[str, Any], ...] = ()
    """Keys of config.json in addition to the sizes."""


RECIPES = {
    "eagle1": Recipe("eagle1", torch.float16, file="pytorch_model.bin", config=(("bias", False),)),
    "hass": Recipe(
        "eagle1",
        torch.bfloat16,
        steps=3,
        bias=True,
        config=(("bias", True), ("rope_theta", 100000.0)),
    ),
    "layernorms": Recipe(
        "eagle1", torch.float16, steps=3, layernorms=True, config=(("bias", False),)
    ),
    "eagle3": Recipe("eagle3", torch.bfloat16, steps=3),
    "eagle31": Recipe(
        "eagle3",
        torch.bfloat16,
        steps=3,
        eagle31=True,
        config=(
            ("architectures", ["LlamaForCausalLMEagle3"]),
            ("fc_norm", True),
            ("norm_output", True),
        ),
    ),
    "dflash": Recipe(
        "dflash",
        torch.bfloat16,
        config=(("num_hidden_layers", 2), ("intermediate_size", 1408), ("block_size", 8)),
    ),
}
