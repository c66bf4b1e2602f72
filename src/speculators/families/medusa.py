"""Medusa heads: what the releases that still serve them need.

vLLM 0.29 to 0.32 (``model_executor/models/medusa.py``, ``transformers_utils/configs/medusa.py``)
read the published names as they are, but a published config.json does not say all that they need.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from speculators.checkpoint.tensor import TensorInfo
from speculators.families.signature import Serving, Signature, vllm

__all__ = ["MEDUSA"]

LAYER = re.compile(r"(medusa_heads\.)?(?P<head>\d+)\.(?P<layer>\d+)\.linear\.(?P<part>weight|bias)")
VLLMS_LAYER = re.compile(r"blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<part>weight|bias)")
"""Names of a head's layers in published checkpoints, and vLLM's own."""

HEAD = re.compile(r"(medusa_heads\.)?\d+\.\d+\.weight|lm_heads\.\d+\.weight")
"""Names of what gives a head's logits, likewise."""


def how_to_serve(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What config.json has to say for vLLM, and how the heads are served.

    Args:
        tensors: the checkpoint's, by their stored names.

    """
    layers = {
        info: found
        for name, info in tensors.items()
        if (found := LAYER.fullmatch(name) or VLLMS_LAYER.fullmatch(name))
    }
    weights = [(info, it) for info, it in layers.items() if it["part"] == "weight"]
    if not weights:
        return None
    said = config_for_vllm(tensors, weights, biased=len(layers) > len(weights))
    settings = {
        "method": "medusa",
        "model": "DIR",
        "num_speculative_tokens": said["num_heads"],
    }
    return (
        "vLLM up to 0.32 reads the weights as they are. Its config.json has to be "
        f"{json.dumps(said)}: published ones lack hidden_size, for which vLLM takes 4096, and "
        "medusa_fc_bias, without which it drops the biases and drafts badly. Serve it with "
        f"--speculative-config '{json.dumps(settings)}'."
    )


def config_for_vllm(
    tensors: Mapping[str, TensorInfo],
    weights: list[tuple[TensorInfo, re.Match[str]]],
    *,
    biased: bool,
) -> dict[str, Any]:
    """The config.json that vLLM needs for these heads.

    Args:
        tensors: all of the checkpoint's.
        weights: those of the heads' layers, each with its numbers.
        biased: whether the layers have biases.

    """
    hidden = weights[0][0].shape[0]
    vocabulary = next((it.shape[0] for name, it in tensors.items() if HEAD.fullmatch(name)), hidden)
    token_map = tensors.get("token_map")
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": 1 + max(int(it["head"]) for _, it in weights),
        "num_hidden_layers": 1 + max(int(it["layer"]) for _, it in weights),
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        **({"medusa_fc_bias": True} if biased else {}),
        **({"truncated_vocab_size": token_map.shape[0]} if token_map else {}),
    }


MEDUSA = Signature(
    "medusa",
    "Medusa heads",
    marks=(
        r"(medusa_heads?\.)?\d+\.\d+\.(linear\.)?(weight|bias)"
        r"|medusa_heads\.\d+\.(medusa_layers\.\d+\.linear|lm_head)\.(weight|bias)"
        r"|blocks\.\d+\.layers\.\d+\.(weight|bias)"
    ),
    hints={"medusa_num_heads": r"\d+"},
    parts=("0.0.linear.weight", "0.0.linear.bias", "0.1.weight"),
    advice=(
        "they are served as published, by the releases that still know them, and are not "
        "converted; `speculators inspect` says what vLLM's config.json has to be"
    ),
    serving=(
        vllm(
            "medusa",
            until="0.32",
            lacks={
                r"(.*\.)?medusa_layers\..*": "ModelOpt's names (medusa_layers)",
                r"medusa_head\..*": "names that begin with medusa_head",
            },
        ),
        Serving("TensorRT-LLM", "convert_checkpoint.py --medusa_model_dir", until="1.3.0rc20"),
    ),
    remark=how_to_serve,
)
