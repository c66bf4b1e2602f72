"""Drafts of the DFlash kind whose tokens depend on those drafted before them in the block."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from speculators.models.dflash.backbone import DFlashSpeculator
from speculators.models.output import DraftOutput

__all__ = ["SequentialSpeculator"]


class SequentialSpeculator(DFlashSpeculator):
    """A draft of one pass whose tokens are then drawn one after the other."""

    @abstractmethod
    def condition(
        self, logits: Tensor, states: Tensor, before: Tensor, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The logits of a token, given the token before it.

        Args:
            logits: (batch, draft vocabulary), of its position by itself.
            states: (batch, hidden), the output that they were made from.
            before: (batch, 1), the token before it, by the verifier's ids.
            memory: what this returned for that token; ``None`` for the first token of a block.

        Returns:
            the conditioned logits, (batch, draft vocabulary), minus infinity for what it rules out;
            and what to pass on for the next token.

        """

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        tokens_before: Tensor | None = None,
    ) -> DraftOutput | tuple[Any, ...]:
        """Compute the logits of the tokens that a block drafts.

        Args:
            input_ids: as for ``DFlashSpeculator.forward``, like all that are not listed.
            hidden_states: likewise.
            attention_mask: likewise.
            past_key_values: likewise.
            use_cache: likewise.
            return_dict: likewise.
            cache: likewise.
            tokens_before: (batch, drafted), the token before each one to draft, by the verifier's
                ids: the anchor, and then those drafted so far. The logits are then those given
                these tokens; otherwise they are the positions' own, which do not know them.

        Raises:
            ValueError, VerifierError: as for ``DFlashSpeculator.forward``.

        """
        output = super().forward(
            input_ids, hidden_states, attention_mask, past_key_values, use_cache, None, cache
        )
        assert isinstance(output, DraftOutput)
        assert output.logits is not None
        assert output.last_hidden_state is not None
        if tokens_before is not None:
            own, states = output.logits, self._drafting(output.last_hidden_state)
            conditioned, memory = [], None
            for place in range(tokens_before.shape[1]):
                logits, memory = self.condition(
                    own[:, place],
                    states[:, place],
                    tokens_before[:, place : place + 1],
                    memory,
                )
                conditioned.append(logits)
            output.logits = torch.stack(conditioned, 1)
        return output if return_dict is not False else output.to_tuple()
