"""DFlash, DFlash 2 and DSpark drafts in elementary operations, to check the models against.

They follow PyPI's dflash 0.1.0 (model.py) and, for DSpark's heads, PyPI's speculators 0.9.0
(models/dspark/model_definitions.py); causality, windows and the pairing of RoPE as vLLM 0.33.0
reads them (model_executor/models/qwen3_dflash.py). They share no code with ``models.dflash``.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from speculators.convert.references.operations import Reference, rope_frequencies
from speculators.families.dflash.config import DFlash2Config, DFlashConfig, DSparkConfig

__all__ = ["DFlash2Reference", "DFlashReference", "DSparkReference"]

Part = Callable[[Tensor], Tensor]
"""The attention or the MLP of a layer, as a function of the block, (block, hidden)."""


class DFlashReference(Reference):
    """A DFlash draft's arithmetic in float32, for one block of one sequence at a time.

    Args:
        tensors: the draft's tensors, weights in float32, by their names in the format.
        config: its config.

    """

    config: DFlashConfig

    def __call__(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """Compute the outputs of a block, after the final norm.

        Args:
            embeddings: (block, hidden), of the anchor and the masks.
            hidden_states: (context, states * verifier width), the verifier's at all tokens before
                the anchor, concatenated.

        Returns:
            (block, hidden).

        """
        context = self._norm("hidden_norm", self._linear("fc", hidden_states))
        x = embeddings
        for number in range(self.layer.num_hidden_layers):
            name = f"layers.{number}"
            y = self._norm(f"{name}.input_layernorm", x)
            x = x + self._apply(f"{name}.attention_conv", y, self._attention(number, context))
            y = self._norm(f"{name}.post_attention_layernorm", x)
            x = x + self._apply(f"{name}.mlp_conv", y, self._mlp(f"{name}.mlp"))
        return self._norm("norm", x)

    def logits(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """The logits of a block's outputs; ``head`` is the verifier's, if the draft has none."""
        return F.linear(x, self.tensors["lm_head.weight"] if head is None else head)

    def conditioned(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """The logits of drafted tokens, given the token before each.

        Args:
            logits: (drafted, draft vocabulary), of the positions by themselves.
            x: (drafted, hidden), the outputs that they were made from.
            before: (drafted,), tokens, by the verifier's ids.

        Returns:
            (drafted, draft vocabulary): here the positions' own.

        """
        del x, before
        return logits

    def _apply(self, name: str, x: Tensor, part: Part) -> Tensor:
        """Apply attention or MLP, with what a kind of draft has around them.

        Args:
            name: the prefix of the tensors of what is around it.
            x: (block, hidden).
            part: the attention or the MLP, as a function of ``x``.

        """
        del name
        return part(x)

    def _mlp(self, name: str) -> Part:
        def mlp(x: Tensor) -> Tensor:
            gate = F.silu(self._linear(f"{name}.gate_proj", x))
            return self._linear(f"{name}.down_proj", gate * self._linear(f"{name}.up_proj", x))

        return mlp

    def _attention(self, number: int, context: Tensor) -> Part:
        """The attention of a layer."""
        name, size = f"layers.{number}.self_attn", self.config.sizes["head"]
        heads = self.layer.num_attention_heads
        groups = heads // (self.layer.num_key_value_heads or heads)

        def attention(x: Tensor) -> Tensor:
            everything = torch.cat((context, x))
            at = torch.arange(len(everything))
            queries = self._linear(f"{name}.q_proj", x).unflatten(1, (-1, size))
            keys = self._linear(f"{name}.k_proj", everything).unflatten(1, (-1, size))
            values = self._linear(f"{name}.v_proj", everything).unflatten(1, (-1, size))
            queries = self._rotated(self._norm(f"{name}.q_norm", queries), at[len(context) :])
            keys = self._rotated(self._norm(f"{name}.k_norm", keys), at)
            seen = self._seen(number, len(context), len(everything))
            attended = []
            for head in range(heads):
                scores = queries[:, head] @ keys[:, head // groups].T / math.sqrt(size)
                weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
                attended.append(weights @ values[:, head // groups])
            return self._linear(f"{name}.o_proj", torch.cat(attended, 1))

        return attention

    def _seen(self, number: int, context: int, length: int) -> Tensor:
        """Whether positions of the block see those of context and block, (block, both)."""
        ahead = torch.arange(length)[None, :] - torch.arange(context, length)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.config.causal[number]:
            seen &= ahead <= 0
        window = self.layer.windows[number]
        if window is not None:
            seen &= ahead.abs() < window
        return seen

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoPE of (length, heads, head size): each pair of channels as a complex number."""
        angles = torch.outer(positions.float(), rope_frequencies(self.layer, x.shape[-1]))
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        if self.layer.is_neox_style:
            real, imaginary = x.chunk(2, -1)
            turned = torch.complex(real, imaginary) * turn
            return torch.cat((turned.real, turned.imag), -1)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)


class DFlash2Reference(DFlashReference):
    """A DFlash 2 draft's arithmetic; arguments are as for ``DFlashReference``."""

    config: DFlash2Config

    def __init__(self, tensors: Mapping[str, Tensor], config: DFlash2Config) -> None:
        # Upstream's own class saves codebooks as weights of embeddings.
        plain = {name.replace("codebook.weight", "codebook"): it for name, it in tensors.items()}
        super().__init__(plain, config)

    def __call__(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        """See ``DFlashReference``."""
        return super().__call__(
            embeddings * (self.config.input_embedding_scale or 1.0), hidden_states
        )

    def logits(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """See ``DFlashReference``."""
        logits = super().logits(x, head) * (self.config.output_multiplier or 1.0)
        bound = self.config.final_logit_softcapping
        return bound * (logits / bound).tanh() if bound else logits

    def conditioned(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """See ``DFlashReference``: the scores of the best tokens, minus infinity for others."""
        selector = "candidate_selector"
        hidden = self._linear(f"{selector}.hidden_projection", x)
        scores = torch.full_like(logits, -math.inf)
        for place, token in enumerate(before):
            after = self.tensors[f"{selector}.predecessor_codebook"][token] * hidden[place]
            for candidate in logits[place].argsort(descending=True)[: self.config.selector_top_k]:
                edge = after @ self.tensors[f"{selector}.successor_codebook"][candidate]
                scores[place, candidate] = logits[place, candidate] + edge
        return scores

    def _apply(self, name: str, x: Tensor, part: Part) -> Tensor:
        before, after = self._linear(f"{name}.kernel_projection", x).chunk(2, -1)
        first, second = self.tensors[f"{name}.base_kernel"]
        return self._convolved(part(self._convolved(x, first, before)), second, after)

    def _convolved(self, x: Tensor, base: Tensor, added: Tensor) -> Tensor:
        """A convolution of (block, hidden), each position with a kernel of its own.

        Args:
            x: (block, hidden).
            base: (taps, hidden), the part of the kernel that all positions share.
            added: (block, taps * groups), what is added to it in all channels of a group.

        """
        taps, group = self.config.conv_kernel_size, self.config.conv_group_size
        added = added.unflatten(-1, (taps, -1))
        result = torch.zeros_like(x)
        for place in range(len(x)):
            for tap in range(min(taps, place + 1)):
                kernel = base[tap].unflatten(0, (-1, group)) + added[place, tap][:, None]
                result[place] += kernel.flatten() * x[place - tap]
        return result


class DSparkReference(DFlashReference):
    """A DSpark draft's arithmetic; arguments are as for ``DFlashReference``."""

    config: DSparkConfig

    def conditioned(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """See ``DFlashReference``: with the Markov head's bias."""
        memory = torch.zeros(self.config.markov_rank)
        biased = []
        for place, token in enumerate(before):
            latent = self.tensors["markov_head.markov_w1.weight"][token]
            if self.config.markov_head_type == "gated":
                gate = self._linear("markov_head.gate_proj", torch.cat((x[place], latent)))
                latent = torch.sigmoid(gate) * latent
            if self.config.markov_head_type == "rnn":
                joint = torch.cat((memory, latent, x[place]))
                kept, new, shown = self._linear("markov_head.joint_proj", joint).chunk(3)
                memory = memory + torch.sigmoid(-kept) * (torch.tanh(new) - memory)
                latent = torch.tanh(shown)
            biased.append(logits[place] + self._linear("markov_head.markov_w2", latent))
        return torch.stack(biased)

    def confidence(self, x: Tensor, before: Tensor) -> Tensor:
        """How likely drafted tokens are to be accepted; arguments as for ``conditioned``."""
        features = x
        if self.config.confidence_head_with_markov:
            embedded = self.tensors["markov_head.markov_w1.weight"][before]
            features = torch.cat((x, embedded), -1)
        return torch.sigmoid(self._linear("confidence_head.proj", features)[:, 0])
