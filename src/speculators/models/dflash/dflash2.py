"""DFlash 2 drafts as transformers models.

A DFlash 2 draft is a DFlash draft with convolutions over the positions of the block, before and
after the attention and the MLP of each layer, and a selector: it picks each token from the best
candidates of its position, given the token before it (PyPI's dflash 0.1.0, model.py,
``GroupedDynamicCausalConv`` and ``CandidateSelector``).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from speculators.families.dflash import DFLASH2
from speculators.models.dflash.backbone import DFlashSpeculatorConfig
from speculators.models.dflash.sequential import SequentialSpeculator

__all__ = ["DFlash2Speculator", "DFlash2SpeculatorConfig"]


class DFlash2SpeculatorConfig(DFlashSpeculatorConfig):
    """The config of a ``DFlash2Speculator``; its JSON is ``families.dflash.config.DFlash2Config``.

    Attributes:
        conv_kernel_size: how many positions each convolution sees.
        conv_group_size: how many channels share what a convolution adds to its kernel.
        selector_rank: the width of the selector's codebooks.
        selector_top_k: how many candidates of each position the selector chooses among.
        input_embedding_scale: what embeddings are multiplied by.
        output_multiplier: what logits are multiplied by.
        final_logit_softcapping: the bound that tanh then keeps the logits within.

    """

    family = DFLASH2

    conv_kernel_size: int | None = None
    conv_group_size: int | None = None
    selector_rank: int | None = None
    selector_top_k: int | None = None
    input_embedding_scale: float | None = None
    output_multiplier: float | None = None
    final_logit_softcapping: float | None = None


class GroupedConvolution(nn.Module):
    """Two causal convolutions over a block, whose kernels depend on the position.

    Each channel has its own kernel (``base_kernel``), and a linear map of the input adds to the
    kernels of all channels of a group alike. The first convolution is applied to the input, the
    second to what a layer makes of it.

    Args:
        hidden: the number of channels.
        taps: how many positions a kernel has: its own and those before it.
        group: the number of channels of a group.

    """

    def __init__(self, hidden: int, taps: int, group: int) -> None:
        super().__init__()
        self.taps, self.group = taps, group
        # Without training, both hand on their input.
        identity = torch.zeros(2, taps, hidden)
        identity[:, 0] = 1
        self.base_kernel = nn.Parameter(identity)
        self.kernel_projection = nn.Linear(hidden, 2 * taps * (hidden // group), bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve the input, (batch, block, hidden).

        Returns:
            the result, (batch, block, hidden), and the kernels of the second convolution,
            (batch, block, taps, hidden), for ``convolve``.

        """
        added = self.kernel_projection(x).unflatten(-1, (2, self.taps, -1))
        kernels = self.base_kernel.to(x.dtype) + added.repeat_interleave(self.group, -1)
        first, second = kernels.unbind(2)
        return convolve(x, first), second


def convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """The sum over taps t of ``kernels[:, i, t] * x[:, i - t]``, for each position i of a block.

    Args:
        x: (batch, block, hidden); it is zero before the block.
        kernels: (batch, block, taps, hidden).

    Returns:
        (batch, block, hidden).

    """
    length, taps = x.shape[1], kernels.shape[2]
    shifted = [F.pad(x, (0, 0, tap, 0))[:, :length] for tap in range(taps)]
    return (kernels * torch.stack(shifted, 2)).sum(2)


class ConvolvedLayer(Qwen3DecoderLayer):
    """A decoder layer with convolutions around its attention and its MLP.

    Args:
        config: of the layer.
        layer_idx: its number.
        taps: as for ``GroupedConvolution``.
        group: likewise.

    """

    def __init__(self, config: Any, layer_idx: int, taps: int, group: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_conv = GroupedConvolution(config.hidden_size, taps, group)
        self.mlp_conv = GroupedConvolution(config.hidden_size, taps, group)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, **attention: Any
    ) -> Tensor:
        """The layer's output, (batch, block, hidden); arguments are as for transformers' layers."""
        x, kernels = self.attention_conv(self.input_layernorm(hidden_states))
        attended, _ = self.self_attn(hidden_states=x, **attention)
        hidden_states = hidden_states + convolve(attended, kernels)
        x, kernels = self.mlp_conv(self.post_attention_layernorm(hidden_states))
        return hidden_states + convolve(self.mlp(x), kernels)


class CandidateSelector(nn.Module):
    """Scores the best candidates of a position, given the token before it.

    The score of candidate c after token p is its logit plus the sum over the codebooks' channels of
    ``predecessor_codebook[p] * hidden_projection(state) * successor_codebook[c]``.

    Args:
        vocabulary: the number of tokens.
        hidden: the width of states.
        rank: the width of the codebooks.
        top_k: how many candidates there are.

    """

    def __init__(self, vocabulary: int, hidden: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocabulary, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocabulary, rank))
        self.hidden_projection = nn.Linear(hidden, rank, bias=False)

    def forward(self, logits: Tensor, states: Tensor, before: Tensor) -> Tensor:
        """The candidates' scores in place of their logits, and minus infinity for other tokens.

        Args:
            logits: (batch, vocabulary).
            states: (batch, hidden).
            before: (batch,), tokens.

        """
        own, candidates = logits.topk(min(self.top_k, logits.shape[-1]), sorted=False)
        keys = self.predecessor_codebook[before] * self.hidden_projection(states)
        edges = (self.successor_codebook[candidates] @ keys[:, :, None])[:, :, 0]
        ruled_out = torch.full_like(logits, -torch.inf)
        return ruled_out.scatter(-1, candidates, own + edges.to(own.dtype))


class DFlash2Speculator(SequentialSpeculator):
    """A DFlash 2 draft: convolutions in the layers, and a selector of candidates.

    Args:
        config: see ``DFlash2SpeculatorConfig``.
        own_embedding: as for ``DFlashSpeculator``.
        own_head: likewise.

    """

    config_class = DFlash2SpeculatorConfig  # type: ignore[misc]
    config: DFlash2SpeculatorConfig
    _no_split_modules = ["ConvolvedLayer"]  # noqa: RUF012

    def _decoder_layer(self, index: int) -> nn.Module:
        taps, group = self.config.conv_kernel_size, self.config.conv_group_size
        assert taps is not None
        assert group is not None
        return ConvolvedLayer(self.config.layer, index, taps, group)

    def _add_parts(self) -> None:
        config: Any = self.config
        self.candidate_selector = CandidateSelector(
            config.layer.vocab_size,
            config.layer.hidden_size,
            config.selector_rank,
            config.selector_top_k,
        )

    def _embed_block(self, tokens: Tensor) -> Tensor:
        embedded = super()._embed_block(tokens)
        scale = self.config.input_embedding_scale
        return embedded if scale is None else embedded * scale

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the head, as ``forward`` does after the final norm.

        Args:
            hidden_states: (batch, sequence, hidden), ``last_hidden_state`` or a part of it.

        Returns:
            (batch, sequence, draft vocabulary), in the head's dtype and on its device: times the
            output multiplier, and then within the bound, where the config has them.

        """
        logits = super().logits(hidden_states)
        if self.config.output_multiplier is not None:
            logits = logits * self.config.output_multiplier
        bound = self.config.final_logit_softcapping
        return logits if bound is None else bound * torch.tanh(logits / bound)

    def condition(
        self, logits: Tensor, states: Tensor, before: Tensor, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The scores of the position's candidates, given the token before it.

        See ``SequentialSpeculator.condition``; tokens that are not candidates are ruled out.
        """
        device = self.device
        scores: Tensor = self.candidate_selector(
            logits.to(device), states.to(device), before[:, 0].to(device)
        )
        return scores, memory
