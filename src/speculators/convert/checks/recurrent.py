"""What a draft that goes from token to token computes, compared with what its tensors say."""

from typing import Any

import torch
from torch import Tensor

from speculators.convert.checks.comparison import check_same
from speculators.convert.checks.forward import ForwardCheck
from speculators.convert.plan import ConversionPlan
from speculators.models.output import DraftOutput

__all__ = ["RecurrentCheck"]

LOGITS = 8
"""At how many positions of each sequence the logits are compared: the head treats all alike, and
each of its rows makes a number at each of them."""

SLOTS = 4
"""How many tokens are drafted in one pass to check a draft that can do so."""


class RecurrentCheck(ForwardCheck):
    """The check of drafts whose position t takes token t+1 and the verifier's state at token t."""

    def _computed(self) -> DraftOutput:
        computed: DraftOutput = self.model(
            input_ids=self.input_ids, hidden_states=self.hidden_states, logits_to_keep=LOGITS
        )
        return computed

    def _drafted(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        drafted: Tensor = self.model.draft(
            input_ids, self.model.project(hidden_states)
        ).last_hidden_state
        return drafted

    def _with_logits(self, drafted: Tensor) -> Tensor:
        return drafted[:, -LOGITS:]

    def _check_causality(self, drafted: Tensor) -> None:
        vocabulary, _ = self.plan.config.verifier_sizes
        changed_ids, changed_states = self.input_ids.clone(), self.hidden_states.clone()
        changed_ids[:, -1] = (changed_ids[:, -1] + 1) % vocabulary
        changed_states[:, -1] = -changed_states[:, -1]
        check_same(
            "The output depends on later positions: the attention is not causal",
            self._drafted(changed_ids, changed_states)[:, :-1],
            drafted[:, :-1],
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
        slots = [
            reference.slots(self._embedded(self.plan, ids), states, mask, SLOTS)
            for ids, states in zip(self.input_ids, self.hidden_states, strict=True)
        ]
        check_same(
            "What it drafts in one pass is not what the source's tensors compute",
            self.model(
                input_ids=self.input_ids,
                hidden_states=self.hidden_states,
                num_draft_tokens=SLOTS,
            ).logits,
            torch.stack(slots),
        )
