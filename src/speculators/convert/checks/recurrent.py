"""What a draft that goes from token to token computes, compared with what its tensors say."""

from typing import Any

import torch
from torch import Tensor

from speculators.convert.checks.comparison import check_same
from speculators.convert.checks.forward import ForwardCheck
from speculators.convert.plan import ConversionPlan
from speculators.models.output import DraftOutput
from speculators.models.speculator import Speculator

__all__ = ["RecurrentCheck"]

LOGITS = 2
"""At how many positions the logits are compared: the head treats all alike, and each of its rows
makes a number at each of them."""

SLOTS = 4
"""How many tokens are drafted in one pass to check a draft that can do so."""


class RecurrentCheck(ForwardCheck):
    """The check of drafts whose position t takes token t+1 and the verifier's state at token t.

    The second sequence is the first one with another end, so that one pass shows causality, too.
    """

    length = 8
    evaluated = 1

    def __init__(self, plan: ConversionPlan, model: Speculator) -> None:
        super().__init__(plan, model)
        for inputs in (self.input_ids, self.hidden_states):
            inputs[1, :-1] = inputs[0, :-1]

    def _computed(self) -> DraftOutput:
        computed: DraftOutput = self.model(
            input_ids=self.input_ids, hidden_states=self.hidden_states, logits_to_keep=LOGITS
        )
        return computed

    def _drafted(self) -> Tensor:
        drafted: Tensor = self.model.draft(
            self.input_ids, self.model.project(self.hidden_states)
        ).last_hidden_state
        return drafted

    def _with_logits(self, drafted: Tensor) -> Tensor:
        return drafted[:, -LOGITS:]

    def _check_causality(self, drafted: Tensor) -> None:
        first, changed = drafted[:, :-1]
        check_same(
            "The output depends on later positions: the attention is not causal", changed, first
        )

    def _evaluate_row(
        self, reference: Any, plan: ConversionPlan, ids: Tensor, hidden_states: Tensor
    ) -> Tensor:
        evaluated: Tensor = reference(self._embedded(plan, ids), hidden_states)
        return evaluated

    def _check_tokens(self, reference: Any, expected: Tensor) -> None:
        del expected  # in one pass, tokens are drafted from other inputs
        config: Any = self.plan.config
        if not config.parallel:
            return
        mask = self._embedded(self.plan, torch.tensor([config.mask_token_id]))
        ids, states = self.input_ids[:1], self.hidden_states[:1]
        slots = reference.slots(self._embedded(self.plan, ids[0]), states[0], mask, SLOTS)
        check_same(
            "What it drafts in one pass is not what the source's tensors compute",
            self.model(input_ids=ids, hidden_states=states, num_draft_tokens=SLOTS).logits,
            slots[None],
        )
