"""What drafts make of known texts, without the verifier.

Whatever was accepted, a draft's cache holds the same for the confirmed tokens, since it is computed
from the verifier's states. So one pass over a text gives what the draft knows at every token at
which a step of decoding can start, a *root*. Drafted tokens are accepted only while they are those
of the text, so what follows a root and matters is always the text's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speculators.decode.drafter import Draft
from speculators.decode.drawing import drafted_distribution
from speculators.decode.sampling import Warp
from speculators.decode.tree import Path
from speculators.evaluate.recording.texts import Text

__all__ = ["LOGITS", "DraftedTexts", "Roots", "Survival"]

LOGITS = 1 << 24
"""How many logits are computed at a time."""

Survival = list[list[int | float]]
"""By root and position: the probability that the token there and all before it are accepted."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Places at which a step can start, in any order.

    Attributes:
        rows: (roots), which text each is in.
        tokens: (roots), which token of it.

    """

    rows: Tensor
    tokens: Tensor

    def __getitem__(self, which: Any) -> "Roots":
        return Roots(self.rows[which], self.tokens[which])

    def __len__(self) -> int:
        return len(self.rows)


class DraftedTexts(ABC):
    """What a draft makes of some texts.

    Args:
        draft: the model.
        texts: with the states that it reads; each has at least two new tokens.

    Attributes:
        tokens: (texts, tokens), padded at the right; on the draft's device.

    """

    def __init__(self, draft: Draft, texts: Sequence[Text]) -> None:
        self.draft = draft
        self.texts = texts
        self.tokens = pad_sequence([text.tokens for text in texts], batch_first=True).to(
            draft.device
        )
        # By token, that with which it was sampled.
        self._p = torch.ones(self.tokens.shape, device=draft.device)
        for row, text in enumerate(texts):
            if text.probabilities is not None:
                self._p[row, text.prompt_tokens : len(text.tokens)] = text.probabilities.to(
                    draft.device
                )

    @abstractmethod
    def survival(self, paths: Sequence[Sequence[Path]]) -> list[list[Survival]]:
        """Whether the tokens of trees of fixed shapes are accepted.

        Args:
            paths: of each tree; chains, if the draft drafts all tokens in one pass.

        Returns:
            by tree, by text.

        """

    @abstractmethod
    def sampled_survival(self, lengths: Sequence[int], warp: Warp) -> list[list[Survival]]:
        """The probabilities that tokens of sampled chains are accepted.

        Args:
            lengths: of each chain.
            warp: shapes the distributions that its tokens are sampled from.

        Returns:
            by chain, by text.

        """

    def states(self) -> Tensor:
        """The verifier's states that are known at some root, (texts, slots, verifier width).

        As many as there are roots and tokens of the prompt before them, padded at the right.
        """
        states = pad_sequence([text.states[:-1] for text in self.texts], batch_first=True)
        return states.to(self.draft.device)

    def chances(self, logits: Tensor, tokens: Tensor, warp: Warp) -> Tensor:
        """The probabilities with which the draft would sample tokens, (rows).

        ``draw_drafted`` samples from the same distributions.

        Args:
            logits: (rows, draft vocabulary).
            tokens: (rows), by the verifier's ids.
            warp: as for ``sampled_survival``.

        """
        q, candidates = drafted_distribution(self.draft, warp, logits)
        return (q * (candidates == tokens[:, None])).sum(-1)

    def accepted(self, q: Tensor, roots: Roots, depth: int) -> Tensor:
        """The probabilities that the text's tokens were drafted and accepted, (roots).

        The draft proposes x with probability q(x). Speculative sampling accepts it with probability
        min(1, p(x) / q(x)), p being the verifier's distribution, and never draws x again otherwise.
        So where the verifier's token is y, it was accepted with probability
        q(y) min(1, p(y) / q(y)) / p(y) = min(1, q(y) / p(y)). For greedy decoding p(y) is 1.

        Args:
            q: (roots), of the text's tokens.
            roots: the roots.
            depth: of these tokens, from 1.

        """
        return (q / self._p[roots.rows, roots.tokens + depth]).clamp(max=1)
