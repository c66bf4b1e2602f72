"""What a draft that goes from token to token computes, compared with what its tensors say."""

from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from speculators.convert.checks.comparison import BATCH, LENGTH, SEED, check_same
from speculators.convert.checks.verifier import (
    check_head_of_source,
    refuse_draft_as_verifier,
    refuse_incomplete,
)
from speculators.convert.plan import ConversionPlan, head_left_out
from speculators.errors import IncompleteVerifierError, SpeculatorsError, ValidationError
from speculators.families.family import imported
from speculators.models.speculator import Speculator
from speculators.models.tensors import read_planned, read_tensor

__all__ = ["RecurrentCheck"]

SLOTS = 4
"""How many tokens are drafted in one pass to check a draft that can do so."""


class RecurrentCheck:
    """Compares what a draft computes on seeded random inputs with what its tensors say.

    Args:
        plan: the plan of the conversion; its tensors are the source's.
        model: the loaded model, in float32.

    Attributes:
        unchecked: sentences on what could not be checked, and why.

    """

    def __init__(self, plan: ConversionPlan, model: Speculator) -> None:
        self.plan, self.model, self.unchecked = plan, model, list[str]()
        self.reference = imported(plan.family.reference)
        generator = torch.Generator().manual_seed(SEED)
        vocabulary, hidden = plan.config.verifier_sizes
        width = hidden * max(1, len(model.verifier_layers))
        self.input_ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=generator)
        self.hidden_states = torch.randn(BATCH, LENGTH, width, generator=generator)
        if model.get_input_embeddings() is None:
            refuse_incomplete(plan.verifier)
            self._leave_unchecked(
                "The verifier's embedding is not available: a random one takes its place"
            )
            stand_in = torch.randn(vocabulary, hidden, generator=generator)
            model.embed_tokens = nn.Embedding.from_pretrained(stand_in)

    def run(self) -> None:
        """Compare them.

        Raises:
            ValidationError: if they differ, or the output is not finite or not causal.
            VerifierError: if the verifier is a draft, or lacks what the draft takes from it.

        """
        drafted = self._drafted(self.input_ids, self.hidden_states)
        if not drafted.isfinite().all():
            raise ValidationError(
                "The forward pass gives values that are not finite; "
                "the source's weights are too large."
            )
        self._check_causality(drafted)
        reference = self.reference(self._tensors(self.plan), self.plan.config)
        if reason := reference.cannot_evaluate():
            self._leave_unchecked(f"The output was not compared with the reference: {reason}")
            expected = drafted
        else:
            expected = self._evaluate(reference, self.plan)
            check_same("The output is not what the source's tensors compute", drafted, expected)
            if self.plan.rounded_to:
                self._log_effect_of_rounding(expected)
        self._check_logits(reference, expected)
        if self.plan.config.parallel and not reason:
            self._check_slots(reference)

    def _leave_unchecked(self, sentence: str) -> None:
        logger.warning(sentence)
        self.unchecked.append(sentence)

    def _drafted(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        drafted: Tensor = self.model.draft(
            input_ids, self.model.project(hidden_states)
        ).last_hidden_state
        return drafted

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

    def _check_logits(self, reference: Any, drafted: Tensor) -> None:
        head = None
        if "head" in self.plan.family.borrows and "head" not in self.plan.features:
            try:
                info = self.plan.verifier.head()
            except SpeculatorsError as error:
                refuse_draft_as_verifier(self.plan.verifier)
                if isinstance(error, IncompleteVerifierError):
                    raise
                self._leave_unchecked(
                    "Logits were not validated, since the verifier's head is not available: "
                    f"{error}"
                )
                for own in self.plan.heads:
                    self._leave_unchecked(head_left_out(own))
                return
            head = read_tensor(info)
            for own in self.plan.heads:
                check_head_of_source(own, info)
        check_same(
            f"The logits are not those of the {'draft' if head is None else 'verifier'}'s head",
            self.model(input_ids=self.input_ids, hidden_states=self.hidden_states).logits,
            reference.logits(drafted, None if head is None else head.float()),
        )

    def _check_slots(self, reference: Any) -> None:
        config: Any = self.plan.config
        mask = self._embedded(self.plan, torch.tensor([config.mask_token_id]))
        expected = [
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
            torch.stack(expected),
        )

    def _log_effect_of_rounding(self, rounded: Tensor) -> None:
        exact_plan = replace(
            self.plan,
            rounded_to=None,
            tensors={
                name: replace(tensor, dtype=tensor.sources[0].dtype) if tensor.sources else tensor
                for name, tensor in self.plan.tensors.items()
            },
        )
        exact = self._evaluate(
            self.reference(self._tensors(exact_plan), self.plan.config), exact_plan
        )
        logger.info(
            f"With its tensors rounded to {self.plan.config.torch_dtype}, the output differs from "
            f"the source's by up to {(rounded - exact).abs().max().item():.2g}, "
            f"at values up to {exact.abs().max().item():.2g}"
        )

    def _evaluate(self, reference: Any, plan: ConversionPlan) -> Tensor:
        return torch.stack(
            [
                reference(self._embedded(plan, ids), states)
                for ids, states in zip(self.input_ids, self.hidden_states, strict=True)
            ]
        )

    def _embedded(self, plan: ConversionPlan, ids: Tensor) -> Tensor:
        """Embeddings of the tokens, from the source's own tensor where it has one."""
        if tensor := plan.tensors.get("embed_tokens.weight"):
            return read_planned(tensor)[ids].float()
        embedding = self.model.get_input_embeddings()
        assert embedding is not None
        embedded: Tensor = embedding(ids)
        return embedded

    def _tensors(self, plan: ConversionPlan) -> dict[str, Tensor]:
        """The planned tensors, by their names in research checkpoints, weights in float32."""
        return {
            plan.family.names.in_research(name): _float(read_planned(tensor))
            for name, tensor in plan.tensors.items()
            if name != "embed_tokens.weight"
        }


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
