"""DSpark drafts as transformers models.

A DSpark draft is a DFlash draft with a Markov head: it adds a bias to the logits of each token that
depends on the token before it, and perhaps on the state or on all tokens before it in the block
(PyPI's speculators 0.9.0, models/dspark/model_definitions.py). A confidence head estimates how
likely a token is to be accepted.
"""

from typing import Any

import torch
from torch import Tensor, nn

from speculators.errors import FormatError
from speculators.families.dflash import DSPARK
from speculators.models.dflash.backbone import DFlashSpeculatorConfig
from speculators.models.dflash.sequential import SequentialSpeculator

__all__ = ["DSparkSpeculator", "DSparkSpeculatorConfig"]


class DSparkSpeculatorConfig(DFlashSpeculatorConfig):
    """The config of a ``DSparkSpeculator``; its JSON is ``families.dflash.config.DSparkConfig``.

    Attributes:
        markov_rank: the width of the Markov head's factors.
        markov_head_type: ``vanilla``, ``gated`` or ``rnn``.
        enable_confidence_head: whether there is a confidence head.
        confidence_head_with_markov: whether it also takes the Markov embedding of the token before.

    """

    family = DSPARK

    sample_from_anchor: bool = True
    markov_rank: int | None = None
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False


class MarkovHead(nn.Module):
    """A bias on logits that depends on the token before.

    With the embedding e of that token and the state h: ``markov_w2`` of e (vanilla); of
    sigmoid(``gate_proj`` of (h, e)) times e (gated); or of tanh(o) with the third part o of
    ``joint_proj`` of (s, e, h), whose first two parts g and c make the next memory s:
    sigmoid(g) s + (1 - sigmoid(g)) tanh(c), zero at first (rnn).

    Args:
        vocabulary: the number of the verifier's tokens.
        drafted: the number of the draft's tokens.
        hidden: the width of states.
        rank: the width of embeddings and of the memory.
        kind: ``vanilla``, ``gated`` or ``rnn``.

    """

    def __init__(self, vocabulary: int, drafted: int, hidden: int, rank: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, drafted, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        if kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def forward(
        self, states: Tensor, before: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The bias of a token.

        Args:
            states: (batch, hidden), the output at its position.
            before: (batch,), the token before it, by the verifier's ids.
            memory: what this returned for that token; ``None`` for the first token of a block.

        Returns:
            (batch, draft vocabulary), and the memory for the next token.

        """
        latent = self.markov_w1(before)
        if self.kind == "gated":
            latent = latent * self.gate_proj(torch.cat((states, latent), -1)).sigmoid()
        if self.kind == "rnn":
            memory = torch.zeros_like(latent) if memory is None else memory
            joint = self.joint_proj(torch.cat((memory, latent, states), -1))
            gate, candidate, output = joint.chunk(3, -1)
            gate = gate.sigmoid()
            memory = gate * memory + (1 - gate) * candidate.tanh()
            latent = output.tanh()
        return self.markov_w2(latent), memory


class ConfidenceHead(nn.Module):
    """A linear map of the state, and perhaps of the Markov embedding, to one number.

    Args:
        width: of its input.

    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(..., width) → (...)."""
        estimate: Tensor = self.proj(features)
        return estimate[..., 0]


class DSparkSpeculator(SequentialSpeculator):
    """A DSpark draft: a DFlash draft with a Markov head, and perhaps a confidence head.

    Args:
        config: see ``DSparkSpeculatorConfig``.
        own_embedding: as for ``DFlashSpeculator``.
        own_head: likewise.

    """

    config_class = DSparkSpeculatorConfig  # type: ignore[misc]
    config: DSparkSpeculatorConfig

    def _add_parts(self) -> None:
        config: Any = self.config
        hidden, rank = config.layer.hidden_size, config.markov_rank
        self.markov_head = MarkovHead(
            config.layer.vocab_size, config.draft_vocab_size, hidden, rank, config.markov_head_type
        )
        width = hidden + (rank if config.confidence_head_with_markov else 0)
        self.confidence_head = ConfidenceHead(width) if config.enable_confidence_head else None

    def condition(
        self, logits: Tensor, states: Tensor, before: Tensor, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The logits with the Markov head's bias; see ``SequentialSpeculator.condition``."""
        device, dtype = self.device, self.fc.weight.dtype
        bias, memory = self.markov_head(
            states.to(device=device, dtype=dtype), before[:, 0].to(device), memory
        )
        return logits + bias.to(logits), memory

    def confidence(self, states: Tensor, before: Tensor) -> Tensor:
        """How likely tokens are to be accepted, by the confidence head's estimate.

        Generating does not use it; engines may, to verify fewer tokens.

        Args:
            states: (batch, drafted, hidden), the outputs at the positions that draft them.
            before: (batch, drafted), the tokens before them, by the verifier's ids.

        Returns:
            (batch, drafted), from 0 to 1.

        Raises:
            FormatError: if the draft has no confidence head.

        """
        if self.confidence_head is None:
            raise FormatError("The draft has no confidence head (enable_confidence_head).")
        features = states.to(device=self.device, dtype=self.fc.weight.dtype)
        if self.config.confidence_head_with_markov:
            embedded = self.markov_head.markov_w1(before.to(self.device))
            features = torch.cat((features, embedded), -1)
        estimate: Tensor = self.confidence_head(features)
        return estimate.sigmoid()
