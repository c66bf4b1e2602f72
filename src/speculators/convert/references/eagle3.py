"""An EAGLE-3, EAGLE-3.1 or P-EAGLE draft in elementary operations, to check the model against.

It follows the reference implementation (SafeAILab/EAGLE, eagle/model/cnets.py) and, for what that
lacks, PyPI's speculators 0.9.0 (models/eagle3/core.py, models/peagle/core.py). It shares no code
with ``models.eagle3``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from speculators.convert.references.operations import (
    Reference,
    attend,
    rope_frequencies,
)
from speculators.families.eagle3 import Eagle3Config

__all__ = ["Eagle3Reference"]


class Eagle3Reference(Reference):
    """The draft's arithmetic in float32, for one sequence at a time.

    Args:
        tensors: the draft's tensors, weights in float32, by their names in the format.
        config: its config.

    """

    config: Eagle3Config

    def __call__(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """Compute what the draft feeds back.

        Args:
            embeddings: (length, hidden), of the token after each position.
            hidden_states: (length, states * verifier width), the verifier's, concatenated.

        Returns:
            (length, hidden): the last layer's output, or its final norm with ``norm_output``.

        """
        return self.recur(embeddings, self.project(hidden_states))

    def project(self, hidden_states: Tensor) -> Tensor:
        """``fc`` of the verifier's states, each or all of them normalised first if need be."""
        states = hidden_states.split(self.config.verifier_hidden_size, -1)
        if self.config.fc_norm:
            states = tuple(self._norm(f"fc_norm.{n}", state) for n, state in enumerate(states))
        joined = torch.cat(states, -1)
        if self.config.norm_before_fc:
            joined = self._norm("input_norm", joined)
        return self._linear("fc", joined)

    def recur(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Compute what the draft feeds back from states of its own width, (length, hidden)."""
        for layer in range(self.layer.num_hidden_layers):
            name = f"layers.{layer}"
            if layer == 0:
                embedded = self._norm(f"{name}.input_layernorm", embeddings)
                normed = self._norm(f"{name}.hidden_norm", states)
                x = self._attention(name, torch.cat((embedded, normed), -1))
                x = x + (normed if self.config.norm_before_residual else states)
            else:
                x = states + self._attention(name, self._norm(f"{name}.input_layernorm", states))
            y = self._norm(f"{name}.post_attention_layernorm", x)
            gate = F.silu(self._linear(f"{name}.mlp.gate_proj", y))
            inner = gate * self._linear(f"{name}.mlp.up_proj", y)
            states = x + self._linear(f"{name}.mlp.down_proj", inner)
        return self._norm("norm", states) if self.config.norm_output else states

    def slots(self, embeddings: Tensor, hidden_states: Tensor, mask: Tensor, count: int) -> Tensor:
        """The logits of the tokens that P-EAGLE drafts in one pass.

        Args:
            embeddings: as for a call.
            hidden_states: as for a call.
            mask: (hidden), the embedding of the mask token.
            count: how many tokens to draft.

        Returns:
            (count, draft vocabulary).

        """
        masked = self.tensors["mask_hidden"].view(1, -1)
        states = torch.cat([hidden_states, *[masked] * (count - 1)])
        drafted = self(torch.cat([embeddings, *[mask.view(1, -1)] * (count - 1)]), states)
        return self.logits(drafted[-count:])

    def logits(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """The logits, over the draft's vocabulary, of what is fed back; the head is the draft's."""
        assert head is None
        normed = x if self.config.norm_output else self._norm("norm", x)
        return F.linear(normed, self.tensors["lm_head.weight"])

    def _attention(self, layer: str, x: Tensor) -> Tensor:
        heads = self.layer.num_attention_heads
        kv_heads = self.layer.num_key_value_heads or heads
        q, k, v = (
            self._linear(f"{layer}.self_attn.{name}_proj", x).unflatten(-1, (n, -1))
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if self.layer.model_type == "qwen3":
            q = self._norm(f"{layer}.self_attn.q_norm", q)
            k = self._norm(f"{layer}.self_attn.k_norm", k)
        attended = attend(q, k, v, rope_frequencies(self.layer, q.shape[-1]))
        return self._linear(f"{layer}.self_attn.o_proj", attended)
