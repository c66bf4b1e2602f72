"""Elementary operations of a decoder layer in float32, for one sequence at a time."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from speculators.format.config import LayerConfig

__all__ = ["Reference", "attend", "not_computed", "rms_norm", "rope_frequencies"]

ROPE_TYPES = {"default", "linear", "dynamic", "llama3"}


class Reference:
    """A draft's arithmetic in float32: what those of several families have in common.

    Args:
        tensors: the draft's tensors, weights in float32, by the names that the family's reference
            reads them by.
        config: its config.

    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        self.tensors = tensors
        self.config = config
        self.layer: Any = config.transformer_layer_config  # of the family

    def cannot_evaluate(self) -> str | None:
        """Why this class cannot compute a draft of this config; ``None`` if it can."""
        return not_computed(self.layer)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.tensors[f"{name}.weight"], self.layer.rms_norm_eps)


def not_computed(config: LayerConfig) -> str | None:
    """Why a layer of this config cannot be computed here; ``None`` if it can."""
    if config.rope_type not in ROPE_TYPES:
        return f"RoPE scaling of type {config.rope_type} is not in it"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act} is not in it"
    return None


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019)."""
    return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def attend(q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor) -> Tensor:
    """Causal attention with RoPE (Su et al. 2021), positions counted from 0.

    Args:
        q: (length, heads, head size).
        k: (length, key-value heads, head size), each for as many consecutive heads.
        v: as ``k``.
        frequencies: (head size / 2), see ``rope_frequencies``.

    Returns:
        (length, heads * head size).

    """
    length, heads, head_size = q.shape
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    q, k = _rotate(q, angles), _rotate(k, angles)
    k, v = (x.repeat_interleave(heads // len(x), dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(head_size)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return attended.transpose(0, 1).flatten(1)


def rope_frequencies(config: LayerConfig, head_size: int) -> Tensor:
    """RoPE's frequencies (Su et al. 2021, section 3.4.2), scaled as the config says.

    Dynamic scaling changes nothing up to max_position_embeddings. Llama 3's keeps the frequencies
    of short wavelengths, divides those of long ones by the factor, and interpolates linearly in
    between (meta-llama/llama-models, ``apply_scaling``).
    """
    frequencies: Tensor = config.rope_theta ** (-torch.arange(0, head_size, 2).float() / head_size)
    scaling = config.rope_scaling or {}
    if config.rope_type == "linear":
        frequencies = frequencies / scaling["factor"]
    if config.rope_type == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling["factor"]
    return frequencies


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
