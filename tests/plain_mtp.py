"""The MTP of Qwen3-Next in elementary operations, from the tensors as they are published.

It shares nothing with the model: float64, one sequence, no cache.
"""

import math
from typing import Any

import torch
from torch import Tensor

from helpers import Tensors

__all__ = ["plain_mtp"]


def plain_mtp(tensors: Tensors, config: dict[str, Any], embedded: Tensor, states: Tensor) -> Tensor:
    """One step of the MTP, with experts or without.

    Args:
        tensors: ``mtp.*``, with a tensor for each expert's matrix.
        config: the verifier's config.json.
        embedded: (length, hidden), the embeddings of the tokens after the states' tokens.
        states: (length, hidden), the verifier's last hidden states, or this function's result.

    Returns:
        (length, hidden), what the verifier's head sees.

    """
    weights = {name.removeprefix("mtp."): it.double() for name, it in tensors.items()}
    eps = config["rms_norm_eps"]

    def norm(x: Tensor, name: str) -> Tensor:
        normed: Tensor = (
            (1 + weights[f"{name}.weight"]) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        )
        return normed

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    both = (
        norm(embedded.double(), "pre_fc_norm_embedding"),
        norm(states.double(), "pre_fc_norm_hidden"),
    )
    x = linear(torch.cat(both, -1), "fc")
    length, heads, size = len(x), config["num_attention_heads"], config["head_dim"]
    place = "layers.0.self_attn"

    h = norm(x, "layers.0.input_layernorm")
    # Each head's query is followed by its gate.
    q, gate = linear(h, f"{place}.q_proj").view(length, heads, 2 * size).chunk(2, -1)
    k = linear(h, f"{place}.k_proj").view(length, -1, size)
    v = linear(h, f"{place}.v_proj").view(length, -1, size)
    q, k = norm(q, f"{place}.q_norm"), norm(k, f"{place}.k_norm")
    rotated = int(size * config["partial_rotary_factor"])
    frequencies = config["rope_theta"] ** -(torch.arange(0, rotated, 2).double() / rotated)
    angles = torch.outer(torch.arange(length).double(), frequencies)[:, None]
    q, k = rotate(q, angles), rotate(k, angles)
    repeats = heads // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v) * gate.sigmoid()
    x = x + linear(attended.reshape(length, -1), f"{place}.o_proj")

    h = norm(x, "layers.0.post_attention_layernorm")

    def mlp(x: Tensor, name: str) -> Tensor:
        gated = torch.nn.functional.silu(linear(x, f"{name}.gate_proj"))
        return linear(gated * linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    if "layers.0.mlp.gate.weight" not in weights:
        return norm(x + mlp(h, "layers.0.mlp"), "norm")

    shares = linear(h, "layers.0.mlp.gate").softmax(-1)
    best = shares.topk(config["num_experts_per_tok"])
    chosen = best.values / best.values.sum(-1, keepdim=True)
    mixed = torch.sigmoid(linear(h, "layers.0.mlp.shared_expert_gate"))
    mixed = mixed * mlp(h, "layers.0.mlp.shared_expert")
    for token in range(length):
        for share, expert in zip(chosen[token], best.indices[token].tolist(), strict=True):
            mixed[token] += share * mlp(h[token], f"layers.0.mlp.experts.{expert}")
    return norm(x + mixed, "norm")


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE on the first components of each head, the two halves of which are pairs."""
    half = angles.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    )
    return torch.cat((*turned, rest), -1)
