"""What a draft computes, compared with what its tensors say: the parts of every such check."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from speculators.checkpoint.tensor import PlannedTensor
from speculators.convert.checks.comparison import ROWS, SEED, check_same
from speculators.convert.checks.planned import PlannedTensors, planned_matrix
from speculators.convert.checks.verifier import (
    check_head_of_source,
    is_incomplete,
    refuse_draft_as_verifier,
    refuse_incomplete,
)
from speculators.convert.plan import ConversionPlan, unchecked_head
from speculators.convert.references.operations import rope_frequencies
from speculators.errors import SpeculatorsError, ValidationError
from speculators.families.family import imported
from speculators.models.output import DraftOutput
from speculators.models.speculator import Speculator

__all__ = ["ForwardCheck"]

TURNS = 256
"""At how many positions RoPE is compared, up to those that its frequencies were trained for. The
sequences are shorter, since what its slow channels turn by then hardly shows in the output."""


class ForwardCheck(ABC):
    """Compares what a draft computes on seeded random inputs with what its tensors say.

    Args:
        plan: the plan of the conversion; its tensors are the source's.
        model: the loaded model, which computes in float32.

    Attributes:
        unchecked: sentences on what could not be checked, and why.
        length: how many tokens each of the sequences has.
        evaluated: of how many of them the reference computes the outputs; it reads all matrices
            once for each.
        input_ids: (ROWS, length), random tokens.
        hidden_states: (ROWS, length, width), random hidden states of the verifier.

    """

    length = 24
    evaluated = ROWS

    def __init__(self, plan: ConversionPlan, model: Speculator) -> None:
        self.plan, self.unchecked = plan, list[str]()
        self.model: Any = model
        self.reference = imported(plan.family.reference)
        generator = torch.Generator().manual_seed(SEED)
        vocabulary, hidden = plan.config.verifier_sizes
        width = hidden * max(1, len(model.verifier_layers))
        self.input_ids = torch.randint(vocabulary, (ROWS, self.length), generator=generator)
        self.hidden_states = torch.randn(ROWS, self.length, width, generator=generator)
        if model.get_input_embeddings() is None:
            refuse_incomplete(plan.verifier)
            self._leave_unchecked(
                "The verifier's embedding is not available: a random one takes its place"
            )
            # Each row is the one before it, moved by one number: as random, and far smaller.
            numbers = torch.randn(vocabulary + hidden, generator=generator)
            stand_in = numbers.as_strided((vocabulary, hidden), (1, 1))
            model.embed_tokens = nn.Embedding.from_pretrained(stand_in)

    def run(self) -> None:
        """Compare them.

        Raises:
            ValidationError: if they differ, or the output is not finite, or depends on what it
                must not see.
            VerifierError: if the verifier is a draft, or lacks what the draft takes from it.

        """
        computed = self._computed() if self.model.get_output_embeddings() is not None else None
        drafted = self._drafted() if computed is None else computed.last_hidden_state
        assert drafted is not None
        if not drafted.isfinite().all():
            raise ValidationError(
                "The forward pass gives values that are not finite; "
                "the source's weights are too large."
            )
        if not drafted.any():
            raise ValidationError(
                "The forward pass gives nothing but zeros, so the source's weights were never "
                "filled; give the checkpoint as it was trained."
            )
        self._check_causality(drafted)
        drafted = drafted[: self.evaluated]
        reference = self.reference(PlannedTensors(self.plan), self.plan.config)
        if reason := reference.cannot_evaluate():
            self._leave_unchecked(f"The output was not compared with the reference: {reason}")
            expected = drafted
        else:
            expected = self._evaluate(reference, self.plan)
            check_same("The output is not what the source's tensors compute", drafted, expected)
            if self.plan.rounded_to:
                self._log_effect_of_rounding(expected)
        self._check_logits(reference, expected, None if computed is None else computed.logits)
        if not reason:
            self._check_rope()
            self._check_tokens(reference, expected)

    @abstractmethod
    def _computed(self) -> DraftOutput:
        """The model's outputs, and the logits of some of them."""

    @abstractmethod
    def _drafted(self) -> Tensor:
        """The model's outputs before the head, (ROWS, positions, hidden)."""

    @abstractmethod
    def _check_causality(self, drafted: Tensor) -> None:
        """Check that the outputs do not depend on what they must not see."""

    @abstractmethod
    def _evaluate_row(
        self, reference: Any, plan: ConversionPlan, ids: Tensor, hidden_states: Tensor
    ) -> Tensor:
        """The outputs of one row by the reference, (positions, hidden)."""

    def _check_tokens(self, reference: Any, expected: Tensor) -> None:
        """Check what else tokens are drafted from, given the outputs; here, nothing."""
        del reference, expected

    @abstractmethod
    def _with_logits(self, drafted: Tensor) -> Tensor:
        """The part of the outputs that ``_computed`` has logits of."""

    def _check_rope(self) -> None:
        if not hasattr(self.model, "rotary_emb"):
            return
        layer: Any = self.plan.config.transformer_layer_config
        positions = torch.arange(min(TURNS, layer.max_position_embeddings))
        cosines, sines = self.model.rotary_emb(self.hidden_states, position_ids=positions[None])
        size = cosines.shape[-1]
        angles = torch.outer(positions.float(), rope_frequencies(layer, size)).repeat(1, 2)
        check_same(
            "The angles of RoPE are not those of the config",
            torch.stack((cosines[0], sines[0])),
            torch.stack((angles.cos(), angles.sin())),
        )

    def _leave_unchecked(self, sentence: str) -> None:
        logger.warning(sentence)
        self.unchecked.append(sentence)

    def _check_logits(self, reference: Any, drafted: Tensor, found: Tensor | None) -> None:
        head, own = None, self.plan.replaced_head
        if "head" in self.plan.family.borrows and "head" not in self.plan.features:
            try:
                info = self.plan.verifier.head()
            except SpeculatorsError as error:
                refuse_draft_as_verifier(self.plan.verifier)
                if is_incomplete(error):
                    raise
                self._leave_unchecked(
                    "Logits were not validated, since the verifier's head is not available: "
                    f"{error}"
                )
                if own is not None:
                    self._leave_unchecked(unchecked_head(own))
                return
            head = planned_matrix(PlannedTensor.copy_of(info))
            if own is not None:
                check_head_of_source(own, info)
        if found is None:
            found = self._computed().logits  # which says why there are none
        assert found is not None
        check_same(
            f"The logits are not those of the {'draft' if head is None else 'verifier'}'s head",
            found[: self.evaluated],
            reference.logits(self._with_logits(drafted), head),
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
            self.reference(PlannedTensors(exact_plan), self.plan.config), exact_plan
        )
        logger.info(
            f"With its tensors rounded to {self.plan.config.torch_dtype}, the output differs from "
            f"the source's by up to {(rounded - exact).abs().max().item():.2g}, "
            f"at values up to {exact.abs().max().item():.2g}"
        )

    def _evaluate(self, reference: Any, plan: ConversionPlan) -> Tensor:
        return torch.stack(
            [
                self._evaluate_row(reference, plan, self.input_ids[row], self.hidden_states[row])
                for row in range(self.evaluated)
            ]
        )

    def _embedded(self, plan: ConversionPlan, ids: Tensor) -> Tensor:
        """Embeddings of the tokens, from the source's own tensor where it has one."""
        if tensor := plan.tensors.get("embed_tokens.weight"):
            return F.embedding(ids, planned_matrix(tensor))
        embedding = self.model.get_input_embeddings()
        assert embedding is not None
        embedded: Tensor = embedding(ids)
        return embedded
