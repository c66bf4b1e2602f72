"""The tests' own evaluation of an EAGLE draft, in float64, from its definition.

RoPE is computed by rotating complex numbers, unlike in the product and in transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(config: Mapping[str, Any], head_dim: int, length: int) -> Tensor:
    """The angle per position of each pair of coordinates, by the papers and the reference."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type")
    theta = config.get("rope_theta", 10000.0)
    if kind in {"linear", "dynamic"}:
        theta = 10000.0  # with these, the reference does not pass on the base
    if kind == "dynamic" and length > config["max_position_embeddings"]:
        longer = scaling["factor"] * length / config["max_position_embeddings"]
        theta *= (longer - (scaling["factor"] - 1)) ** (head_dim / (head_dim - 2))
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "linear":
        frequencies = [f / scaling["factor"] for f in frequencies]
    if kind == "llama3":
        frequencies = [_llama3(f, scaling) for f in frequencies]
    return torch.tensor(frequencies, dtype=torch.float64)


def _llama3(frequency: float, scaling: Mapping[str, Any]) -> float:
    wavelength = 2 * math.pi / frequency
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return float(frequency / scaling["factor"])
    smooth = (context / wavelength - low) / (high - low)
    return float((1 - smooth) * frequency / scaling["factor"] + smooth * frequency)


def plain_norm(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str, x: Tensor
) -> Tensor:
    """Apply the norm of this name to ``x`` (..., hidden), if the checkpoint has it."""
    if f"{name}.weight" not in tensors:
        return x
    size: Tensor = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
    return tensors[f"{name}.weight"].double() * x / size


def plain_draft(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], input_ids: Tensor, states: Tensor
) -> Tensor:
    """The layer's output for one sequence: ids (length), hidden states (length, hidden)."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    length = len(input_ids)

    def norm(name: str, x: Tensor) -> Tensor:
        return plain_norm(t, config, name, x)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", torch.zeros(1).double())

    embedded = norm("embed_layernorm", t["embed_tokens.weight"][input_ids])
    x = linear("fc", torch.cat([embedded, norm("hidden_layernorm", states.double())], dim=-1))

    attention = "layers.0.self_attn"
    q = linear(f"{attention}.q_proj", x).view(length, heads, -1)
    k, v = (linear(f"{attention}.{n}_proj", x).view(length, kv_heads, -1) for n in ("k", "v"))
    angles = torch.outer(
        torch.arange(length).double(), rope_frequencies(config, q.shape[-1], length)
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(y: Tensor) -> Tensor:
        half = y.shape[-1] // 2
        z = torch.complex(y[..., :half], y[..., half:]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    q, k = turned(q), turned(k)
    out = torch.empty_like(q)
    causal = torch.ones(length, length).tril() == 1
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, group].T / math.sqrt(q.shape[-1])
        out[:, head] = scores.where(causal, -math.inf).softmax(-1) @ v[:, group]
    x = x + linear(f"{attention}.o_proj", out.flatten(1))

    y = norm("layers.0.post_attention_layernorm", x)
    gate = linear("layers.0.mlp.gate_proj", y)
    up = linear("layers.0.mlp.up_proj", y)
    return x + linear("layers.0.mlp.down_proj", gate * gate.sigmoid() * up)
