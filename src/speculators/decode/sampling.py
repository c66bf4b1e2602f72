"""The verifier's choice of the next token.

After each node, one token is sampled from the verifier's distribution, as the verifier's own
``generate`` would; the tree is followed as long as it contains the sampled token. So the output has
the verifier's distribution, whatever was proposed. This equals the multi-round scheme of EAGLE
(arXiv:2401.15077, section 4.3) for candidates that were not sampled: accepting the child x with
probability p(x), and otherwise going on with p without x, accepts each child with probability p(x).

Where the proposal was itself sampled, from the draft's distribution q, the two samples are coupled
so that they are equal as often as possible: this is speculative sampling (Leviathan et al., 2023,
arXiv:2211.17192; Chen et al., 2023, arXiv:2302.01318). The proposed token is accepted with
probability min(1, p/q); otherwise a token is sampled from max(0, p - q), normalised.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from speculators.errors import GenerationError

__all__ = ["Choice", "Warp", "coupled_draw", "draw", "for_row", "warp_of"]

WARPERS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that do not depend on the preceding tokens; a subclass of one may."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How the verifier chooses a token.

    Attributes:
        processors: applied to its logits first.
        do_sample: sample instead of taking the best token.
        device: the device of the processors' own tensors.

    """

    processors: LogitsProcessorList
    do_sample: bool
    device: torch.device

    @property
    def is_argmax(self) -> bool:
        """Whether it is always the token with the highest logit."""
        return not self.do_sample and not self.processors

    @property
    def is_memoryless(self) -> bool:
        """Whether it does not depend on the preceding tokens, given the logits."""
        return all(type(one) in WARPERS for one in self.processors)

    def __call__(
        self,
        before: Sequence[int],
        logits: Tensor,
        proposed: Tensor | None = None,
        q: Tensor | None = None,
    ) -> int:
        """Choose the next token.

        Args:
            before: all preceding tokens, padding included.
            logits: (vocabulary), the verifier's after them.
            proposed: (1), a token that was sampled from ``q``.
            q: (vocabulary), the draft's distribution over the verifier's tokens.

        Raises:
            GenerationError: if there is no distribution to sample from.

        """
        scores = logits.to(copy=True, device=self.device, dtype=torch.float32)[None]
        if self.processors:
            tokens = None if self.is_memoryless else torch.tensor([before], device=self.device)
            scores = self.processors(tokens, scores)  # type: ignore[arg-type]
        if not self.do_sample:
            return int(scores.argmax())
        p = scores[0].softmax(-1)
        if proposed is None or q is None:
            drawn = draw(p)
        else:
            drawn = coupled_draw(p, q.to(p.device), proposed.to(p.device))
        # A failure is encoded in the token, so that the host waits for the device only once.
        token = int(torch.where(p[drawn].isnan(), -1, drawn))
        if token < 0:
            raise GenerationError(
                "There is no token to sample: the verifier's logits are not numbers, or the "
                "sampling settings leave none. If it overflows in float16, load it in bfloat16."
            )
        return token


def for_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors for one row of a batch.

    From transformers 5.23 on the repetition penalty knows how much of each row is padding.
    """
    alone = LogitsProcessorList(processors)
    for at, processor in enumerate(processors):
        lengths = getattr(processor, "prompt_ignore_length", None)
        if isinstance(lengths, Tensor):
            alone[at] = copy.copy(processor)
            alone[at].prompt_ignore_length = lengths[row : row + 1]
    return alone


def draw(p: Tensor) -> Tensor:
    """Sample a token from each distribution.

    Each token gets an exponentially distributed waiting time, with its probability as the rate, and
    the first one wins. ``Tensor.multinomial`` samples the same way, but checks the probabilities
    first, for which the host must wait for the device.

    Args:
        p: (..., vocabulary), probabilities; they are not checked.

    Returns:
        tokens, (..., 1).

    """
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


def coupled_draw(p: Tensor, q: Tensor, proposed: Tensor) -> Tensor:
    """Sample from p, with ``proposed``, a sample from q, as the result as often as possible.

    Args:
        p: (vocabulary), probabilities.
        q: (vocabulary), probabilities.
        proposed: (1), the token that was sampled from q.

    Returns:
        a token, (1).

    """
    residual = (p - q).clamp_min(0)
    # If p equals q up to rounding, nothing may be left to sample from; p is used instead.
    residual = torch.where(residual.sum() > 0, residual, p)
    accepted = torch.rand_like(p[:1]) * q[proposed] < p[proposed]
    return torch.where(accepted, proposed, draw(residual))


@dataclass(frozen=True, slots=True)
class Warp:
    """The processors that bring the draft's distribution closer to the verifier's.

    A proposal may come from any distribution; the closer it is to the verifier's, the more often
    the proposal is accepted. Two warps are equal if their settings are.

    Attributes:
        settings: the types of the warpers, in order, with all their values.
        warpers: applied to logits.

    """

    settings: str
    warpers: LogitsProcessorList = field(compare=False)

    def __call__(self, logits: Tensor) -> Tensor:
        """Warp logits, (rows, vocabulary), before tokens are sampled from them."""
        return self.warpers(None, logits)  # type: ignore[arg-type]


def warp_of(processors: LogitsProcessorList) -> Warp:
    """Those of the verifier's processors that do not depend on the preceding tokens."""
    warpers = [one for one in processors if type(one) in WARPERS]
    settings = [
        (type(one).__name__, {name: _exact(value) for name, value in vars(one).items()})
        for one in warpers
    ]
    return Warp(repr(settings), LogitsProcessorList(warpers))


def _exact(value: Any) -> Any:
    """A setting in a form whose ``repr`` shows all digits, unlike a tensor's."""
    return value.tolist() if isinstance(value, Tensor) else value
