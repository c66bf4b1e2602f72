"""The interfaces between a draft model and the rest of speculative decoding.

A *draft* is a model. A *drafter* runs it in one particular way, keeps its cache, and proposes a
tree of tokens in every step. Nothing else in this package knows how a tree comes about.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from speculators.decode.cache import BlockCache
from speculators.decode.sampling import Warp
from speculators.decode.tree import Tree

__all__ = ["Draft", "Drafter"]


class Draft(Protocol):
    """What every draft model provides, however it drafts."""

    @property
    def device(self) -> torch.device:
        """The device of its inputs and outputs."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""

    @property
    def verifier_layers(self) -> tuple[int, ...]:
        """Which hidden states of the verifier it reads, in the order in which it expects them.

        The number i stands for the residual stream that enters decoder layer i: 0 is the output of
        the embedding, and the number of layers is what leaves the last layer, before the final
        norm. If empty, the draft reads the last hidden state, after the final norm.
        """

    @property
    def verifier_vocab_size(self) -> int:
        """The number of tokens that the verifier's logits cover."""

    def logits(self, states: Tensor, /) -> Tensor:
        """The logits of its outputs, (..., draft width) → (..., draft vocabulary)."""

    def to_verifier(self, tokens: Tensor, /) -> Tensor:
        """Translate its own token ids, of any shape, to the verifier's; the ids may be the same."""


class Drafter(ABC):
    """A draft, its cache, and a way of proposing tokens.

    Confirmed tokens are passed on in order, each exactly once, and each with the verifier's hidden
    state at the token before it. The first token of a prompt is therefore never passed on.

    Args:
        draft: the model.
        cache: an empty one.
        deepest: the greatest number of levels that its proposals have below their root.
        reach: the greatest number of slots that a step takes in either cache, counted from the end
            of the confirmed slots of the longer one.

    Attributes:
        warp: shapes the distribution that proposals are sampled from; ``None`` if they are not
            sampled.

    """

    warp: Warp | None = None

    def __init__(self, draft: Draft, cache: BlockCache, deepest: int, reach: int) -> None:
        self.draft = draft
        self.cache = cache
        self.deepest = deepest
        self.reach = reach

    @abstractmethod
    def prefill(self, tokens: Tensor, states: Tensor) -> None:
        """Run the draft on the prompts, and keep them in its cache.

        Args:
            tokens: (rows, length), the prompts without their first tokens, padded at the left.
            states: (rows, length, verifier width), the verifier's hidden state at the token before
                each; of several layers, concatenated in the order of ``verifier_layers``.

        """

    @abstractmethod
    def propose(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tree:
        """Run the draft on newly confirmed tokens, and propose what may follow the last of them.

        The tokens are kept in the cache, the proposal is not. While a CUDA graph is recorded, this
        must not wait for the device.

        Args:
            tokens: (rows, length), the confirmed tokens that were not passed on yet, padded at the
                right.
            states: as for ``prefill``.
            counts: by row, the number of tokens without padding; a tensor while a CUDA graph is
                recorded.

        """
