"""When a sequence ends."""

from collections.abc import Sequence

import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

__all__ = ["Stopping"]


class Stopping:
    """Tells whether a sequence ends with its latest token, one sequence at a time.

    End-of-sequence tokens and the maximum length, the usual criteria, are checked without tensors.

    Args:
        criteria: the verifier's.
        device: of the tensors that other criteria are given.

    """

    def __init__(self, criteria: StoppingCriteriaList, device: torch.device) -> None:
        self.device = device
        self.ends: set[int] = set()
        self.max_length = float("inf")
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.ends |= set(criterion.eos_token_id.tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                self.max_length = min(self.max_length, criterion.max_length)
            else:
                self.others.append(criterion)

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the sequence, its prompt included, ends with the last of these tokens."""
        if tokens[-1] in self.ends or len(tokens) >= self.max_length:
            return True
        if not self.others:
            return False
        return bool(self.others(torch.tensor([tokens], device=self.device), None))
