"""The verifier's choice of the next token.

After a node the verifier's token is drawn once, from its own distribution, as its own ``generate``
draws it; the tree is followed for as long as it holds the token that was drawn. So the output's
distribution is the verifier's whatever was proposed, and this is the multi-round scheme of EAGLE
(arXiv:2401.15077, section 4.3) for candidates that are no draws themselves: accepting the child x
with probability p(x), or else going on with p without x, accepts each child with probability p(x).

Where the proposal is itself a draw from the draft's distribution q, the two draws are coupled so
that they are equal as often as can be: that is speculative sampling (Leviathan et al., 2023,
arXiv:2211.17192; Chen et al., 2023, arXiv:2302.01318). The proposal is taken with probability
min(1, p/q), and otherwise the token is drawn from max(0, p - q), normalised.
"""

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

__all__ = ["Choice", "Warp", "coupled_draw", "draw", "warp_of"]

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
"""What shapes a distribution whatever the tokens before it; a class derived from one may not."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How the verifier chooses a token.

    Attributes:
        processors: what is done to its logits before.
        do_sample: draw, instead of taking the best.
        device: where the processors' own tensors are.

    """

    processors: LogitsProcessorList
    do_sample: bool
    device: torch.device

    @property
    def is_best(self) -> bool:
        """Whether it is the token with the highest logit, always."""
        return not self.do_sample and not self.processors

    @property
    def is_memoryless(self) -> bool:
        """Whether the tokens before do not matter."""
        return all(type(one) in WARPERS for one in self.processors)

    def __call__(
        self,
        before: Sequence[int],
        logits: Tensor,
        proposed: Tensor | None = None,
        q: Tensor | None = None,
    ) -> int:
        """Choose.

        Args:
            before: all tokens before, padding included.
            logits: (vocabulary), the verifier's after them.
            proposed: a token, (1), that was drawn from ``q``.
            q: the draft's distribution, (vocabulary).

        Raises:
            GenerationError: if there is no distribution to draw from.

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
        # With what is wrong told by the token, the host waits for the device once.
        token = int(torch.where(p[drawn].isnan(), -1, drawn))
        if token < 0:
            raise GenerationError(
                "There is no token to draw: the verifier's logits are not numbers, or the settings "
                "leave none over. In float16 a verifier may overflow; then load it in bfloat16."
            )
        return token


def draw(p: Tensor) -> Tensor:
    """A draw from each distribution.

    The token that comes first if each comes after a time that is exponentially distributed with
    its probability as the rate. ``Tensor.multinomial`` draws in the same way, but checks the
    probabilities before, for which the host must wait for the device.

    Args:
        p: (..., vocabulary), probabilities; they are not checked.

    Returns:
        tokens, (..., 1).

    """
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


def coupled_draw(p: Tensor, q: Tensor, proposed: Tensor) -> Tensor:
    """A draw from p that is ``proposed``, itself a draw from q, as often as can be.

    Args:
        p: (vocabulary), probabilities.
        q: (vocabulary), probabilities.
        proposed: (1), the token that was drawn from q.

    Returns:
        a token, (1).

    """
    rest = (p - q).clamp_min(0)
    # Where p is q but for rounding, nothing is left to draw from; nor is it ever needed then.
    rest = torch.where(rest.sum() > 0, rest, p)
    accepted = torch.rand_like(p[:1]) * q[proposed] < p[proposed]
    return torch.where(accepted, proposed, draw(rest))


@dataclass(frozen=True, slots=True)
class Warp:
    """What makes the draft's distribution more like the verifier's.

    A proposal may come from any distribution; the closer it is to the verifier's, the more often
    it is accepted. Two warps are equal if their settings are.

    Attributes:
        settings: which warpers they are, in their order, and all that they hold.
        warpers: what is done to logits.

    """

    settings: str
    warpers: LogitsProcessorList = field(compare=False)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits, (rows, vocabulary), as tokens are drawn from them."""
        return self.warpers(None, logits)  # type: ignore[arg-type]


def warp_of(processors: LogitsProcessorList) -> Warp:
    """The part of the verifier's processors that does not depend on the tokens before."""
    warpers = [one for one in processors if type(one) in WARPERS]
    settings = [
        (type(one).__name__, {name: _exact(value) for name, value in vars(one).items()})
        for one in warpers
    ]
    return Warp(repr(settings), LogitsProcessorList(warpers))


def _exact(value: Any) -> Any:
    """A setting in a form of which ``repr`` shows all digits; of a tensor it shows a few."""
    return value.tolist() if isinstance(value, Tensor) else value
