"""What llama.cpp's converter reads of exports, by the record of a run of it.

``record_llamacpp.py`` made ``recorded/llamacpp.json``: of the exports of golden drafts the keys of
config.json that the converter looked at, with their values, and what it wrote into the GGUF file.
Of these files llama-server then drafted what our models draft (docs/serving.md). So an export that
is the same in all that the converter reads is still served.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

__all__ = ["RECORD", "check_against_the_record", "flat_config"]

RECORD = Path(__file__).parent / "recorded" / "llamacpp.json"

IN_GGUF = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "embed_tokens": "token_embd",
    "hidden_norm": "enc.output_norm",
    "markov_head.markov_w1": "markov_w1",
    "markov_head.markov_w2": "markov_w2",
    "confidence_head.proj": "conf_proj",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
    "candidate_selector.hidden_projection": "selector_hidden",
    "d2t": "d2t",
}
"""Module of a draft → its name in a GGUF file."""
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{it}_proj": f"attn_{it}" for it in ("q", "k", "v")},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{it}_norm": f"attn_{it}_norm" for it in ("q", "k")},
    **{f"mlp.{it}_proj": f"ffn_{it}" for it in ("gate", "up", "down")},
    **{
        f"{ours}_conv.{part}": f"{theirs}_conv_{name}"
        for ours, theirs in (("attention", "attn"), ("mlp", "ffn"))
        for part, name in (("base_kernel", "base"), ("kernel_projection", "proj"))
    },
}


def check_against_the_record(name: str, exported: Path, draft: dict[str, Any]) -> None:
    """Assert that llama.cpp's converter reads of an export what it read when it was run.

    Args:
        name: of the record.
        exported: the directory of the export.
        draft: the config of the converted draft, by which what the converter wrote was right.

    """
    found = json.loads(RECORD.read_text(encoding="utf-8"))[name]
    config = flat_config(exported)
    assert {key: config.get(key) for key in found["read"]} == found["read"]
    with safe_open(exported / "model.safetensors", "pt") as file:
        names = [it for it in file.keys() if it != "t2d"]  # noqa: SIM118
        shapes = {it: file.get_slice(it).get_shape() for it in names}
    assert {_in_gguf(it): shape for it, shape in shapes.items()} == found["tensors"]
    wrote = {key.split(".", 1)[-1]: value for key, value in found["wrote"].items()}
    layer = draft["transformer_layer_config"]
    for key, value in {
        "target_layers": draft.get("eagle_aux_hidden_state_layer_ids")
        or draft["aux_hidden_state_layer_ids"],
        "attention.key_length": layer["head_dim"],
        "rope.freq_base": layer["rope_theta"],
        "block_size": draft.get("block_size"),
        "ggml.mask_token_id": draft.get("mask_token_id"),
        "norm_before_residual": draft.get("norm_before_residual"),
        "attention.sliding_window": layer.get("sliding_window"),
    }.items():
        assert wrote.get(key) == value, key
    causal = draft.get("sliding_window_non_causal") is False
    assert wrote.get("attention.causal", False) == causal


def flat_config(directory: Path) -> dict[str, Any]:
    """The keys of a directory's config.json, with those of ``dflash_config`` by their paths."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    nested = config.pop("dflash_config", {})
    return config | {f"dflash_config.{key}": it for key, it in nested.items()}


def _in_gguf(name: str) -> str:
    """The name in a GGUF file of a tensor of an export."""
    module, _, kind = name.rpartition(".")
    if name in IN_GGUF or kind not in {"weight", "bias"}:
        module, kind = name, ""
    layer = re.fullmatch(r"(?:midlayer|layers\.(\d+))\.(.*)", module)
    found = f"blk.{layer[1] or 0}.{IN_LAYER[layer[2]]}" if layer else IN_GGUF[module]
    return f"{found}.{kind}" if kind else found
