"""An EAGLE-1 draft in elementary tensor operations, to check the model against.

It follows the reference implementation (SafeAILab/EAGLE, eagle/model/cnets1.py) and, for the extra
layernorms, the training code of that variant. It shares no code with ``models.eagle``, and reads
the tensors of a research checkpoint by their original names.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from speculators.families.eagle import EagleConfig

__all__ = ["EagleReference"]

ROPE_TYPES = {None, "linear", "dynamic", "llama3"}


class EagleReference:
    """The draft's arithmetic in float32, for one sequence at a time.

    Args:
        tensors: the source's tensors in float32, by their names in the source.
        config: its config; the sizes, the epsilon of the norms and RoPE are used.

    """

    def __init__(self, tensors: Mapping[str, Tensor], config: EagleConfig) -> None:
        self.tensors = tensors
        self.config = config.transformer_layer_config

    def cannot_evaluate(self) -> str | None:
        """Why this class cannot compute a draft of this config; ``None`` if it can."""
        rope_type = (self.config.rope_scaling or {}).get("rope_type")
        if rope_type not in ROPE_TYPES:
            return f"RoPE scaling of type {rope_type} is not in it"
        if self.config.hidden_act != "silu":
            return f"the activation {self.config.hidden_act} is not in it"
        return None

    def __call__(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """Compute the layer's output; arguments and output have the shape (sequence, hidden)."""
        fused = (
            self._norm("embed_layernorm", embeddings),
            self._norm("hidden_layernorm", hidden_states),
        )
        x = self._linear("fc", torch.cat(fused, -1))
        x = x + self._attention(x)
        y = self._norm("layers.0.post_attention_layernorm", x)
        gate = F.silu(self._linear("layers.0.mlp.gate_proj", y))
        return x + self._linear(
            "layers.0.mlp.down_proj", gate * self._linear("layers.0.mlp.up_proj", y)
        )

    def logits(self, x: Tensor, head: Tensor | None) -> Tensor:
        """The logits of the layer's output, with the verifier's head, (vocabulary, hidden)."""
        assert head is not None
        return F.linear(self._norm("lm_head_layernorm", x), head)

    def _attention(self, x: Tensor) -> Tensor:
        heads = self.config.num_attention_heads
        kv_heads = self.config.num_key_value_heads or heads
        q, k, v = (
            self._linear(f"layers.0.self_attn.{name}_proj", x)
            .unflatten(-1, (n, -1))
            .transpose(0, 1)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        angles = torch.outer(
            torch.arange(len(x), dtype=torch.float32), self._frequencies(q.shape[-1])
        ).repeat(1, 2)
        q, k = _rotate(q, angles), _rotate(k, angles)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self._linear("layers.0.self_attn.o_proj", attended.transpose(0, 1).flatten(1))

    def _frequencies(self, head_dim: int) -> Tensor:
        """RoPE's frequencies (Su et al. 2021, section 3.4.2), scaled as the config says.

        Dynamic scaling changes nothing up to max_position_embeddings. Llama 3's keeps the
        frequencies of short wavelengths, divides those of long ones by the factor, and interpolates
        linearly in between (meta-llama/llama-models, ``apply_scaling``).
        """
        frequencies: Tensor = self.config.rope_theta ** (
            -torch.arange(0, head_dim, 2).float() / head_dim
        )
        scaling = self.config.rope_scaling or {}
        if scaling.get("rope_type") == "linear":
            frequencies = frequencies / scaling["factor"]
        if scaling.get("rope_type") == "llama3":
            turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = kept * frequencies + (1 - kept) * frequencies / scaling["factor"]
        return frequencies

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """Root-mean-square norm (Zhang and Sennrich 2019); the identity if the source lacks it."""
        scale = self.tensors.get(f"{name}.weight")
        if scale is None:
            return x
        return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
