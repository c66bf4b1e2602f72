"""An EAGLE-1 draft in elementary tensor operations, to check the model against.

It follows the reference implementation (SafeAILab/EAGLE, eagle/model/cnets1.py) and, for the extra
layernorms, the training code of that variant. It shares no code with ``models.eagle``, and reads
the tensors of a research checkpoint by their original names.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from speculators.convert.references.operations import (
    Reference,
    attend,
    rms_norm,
    rope_frequencies,
)
from speculators.families.eagle import EagleConfig

__all__ = ["EagleReference"]


class EagleReference(Reference):
    """The draft's arithmetic in float32, for one sequence at a time.

    Args:
        tensors: the source's tensors in float32, by their names in the source.
        config: its config; the sizes, the epsilon of the norms and RoPE are used.

    """

    config: EagleConfig

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
        heads = self.layer.num_attention_heads
        kv_heads = self.layer.num_key_value_heads or heads
        q, k, v = (
            self._linear(f"layers.0.self_attn.{name}_proj", x).unflatten(-1, (n, -1))
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        frequencies = rope_frequencies(self.layer, q.shape[-1])
        return self._linear("layers.0.self_attn.o_proj", attend(q, k, v, frequencies))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """Root-mean-square norm; the identity if the source lacks it."""
        scale = self.tensors.get(f"{name}.weight")
        return x if scale is None else rms_norm(x, scale, self.layer.rms_norm_eps)
