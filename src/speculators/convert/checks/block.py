"""What a draft of blocks computes from a context, compared with what its tensors say."""

from typing import Any

import torch
from torch import Tensor

from speculators.convert.checks.comparison import SEED, check_same
from speculators.convert.checks.forward import ForwardCheck
from speculators.convert.plan import ConversionPlan
from speculators.models.output import DraftOutput

__all__ = ["BlockCheck"]

BLOCK = 12
"""The most positions of a block that are compared: the reference takes one at a time."""


class BlockCheck(ForwardCheck):
    """The check of drafts that read the verifier's states as context, and run on a block.

    The first of a row's tokens is the anchor. Where drafted tokens depend on those before them, the
    row's tokens stand for these.
    """

    def _drafted(self) -> Tensor:
        drafted: Tensor = self.model.draft(
            self._block(self.input_ids), self.hidden_states
        ).last_hidden_state
        return drafted

    def _block(self, input_ids: Tensor) -> Tensor:
        """The first token of each row, and masks."""
        block = input_ids[:, : min(self.model.block_size, BLOCK)].clone()
        block[:, 1:] = self.model.mask_token_id
        return block

    def _check_causality(self, drafted: Tensor) -> None:
        """Check what a block sees.

        Context that comes in two parts is the same context. What pads the shorter of two rows at
        the right is not seen. Where all layers are causal, no position sees later ones.
        """
        block, states = self._block(self.input_ids), self.hidden_states
        half = self.length // 2
        begun = self.model.draft(block, states[:, :half], use_cache=True)
        check_same(
            "The output depends on how the context is passed on: the cache does not keep it",
            self.model.draft(block, states[:, half:], None, begun.cache).last_hidden_state,
            drafted,
        )
        later = torch.cat((states[:, half:], -states[:, :half]), 1)
        begun = self.model.draft(block, states[:, :half], use_cache=True)
        self.model.remember(later, [self.length, self.length - half], begun.cache)
        check_same(
            "The output depends on states that come later than its context",
            self.model.run_block(block, begun.cache)[1:],
            drafted[1:],
        )
        config: Any = self.plan.config
        if all(config.causal):
            block[:, -1] = self.input_ids[:, 1]
            check_same(
                "The output depends on later positions: the attention is not causal",
                self.model.draft(block, states).last_hidden_state[:, :-1],
                drafted[:, :-1],
            )

    def _evaluate_row(
        self, reference: Any, plan: ConversionPlan, ids: Tensor, hidden_states: Tensor
    ) -> Tensor:
        block = self._block(ids[None])[0]
        embedded = self._embedded(plan, block)
        if self.model.mask_embedding is not None:
            embedded[block == self.model.mask_token_id] = self.model.mask_embedding
        evaluated: Tensor = reference(embedded, hidden_states)
        return evaluated

    def _computed(self) -> DraftOutput:
        computed: DraftOutput = self.model(self._block(self.input_ids), self.hidden_states)
        return computed

    def _with_logits(self, drafted: Tensor) -> Tensor:
        """The outputs at the positions that draft a token."""
        return drafted[:, self.model.block_size - self.model.drafted_per_block :]

    def _check_tokens(self, reference: Any, expected: Tensor) -> None:
        """Check what makes tokens depend on those before them, and the confidence in them.

        Both are computed from random logits, so that this takes no head.
        """
        states = self._with_logits(expected)
        rows, drafted, _ = states.shape
        before = self.input_ids[:, :drafted]
        if condition := getattr(self.model, "condition", None):
            config: Any = self.plan.config
            generator = torch.Generator().manual_seed(SEED)
            logits = torch.randn(rows, drafted, config.draft_vocab_size, generator=generator)
            memory, found = None, []
            for place in range(drafted):
                conditioned, memory = condition(
                    logits[:, place], states[:, place], before[:, place : place + 1], memory
                )
                found.append(conditioned)
            wanted = torch.stack(
                [reference.conditioned(*row) for row in zip(logits, states, before, strict=True)]
            )
            problem = "How a token depends on those before it is not what the source's tensors say"
            given = torch.stack(found, 1)
            check_same(problem, given.isfinite(), wanted.isfinite().float())
            check_same(problem, given.nan_to_num(neginf=0.0), wanted.nan_to_num(neginf=0.0))
        if getattr(self.model, "confidence_head", None) is not None:
            check_same(
                "The confidence in tokens is not what the source's tensors compute",
                self.model.confidence(states, before),
                torch.stack(
                    [reference.confidence(*row) for row in zip(states, before, strict=True)]
                ),
            )
