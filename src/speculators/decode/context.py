"""Drafting a chain in one pass with a draft that attends to the verifier's states, as DFlash's.

The draft's layers turn the verifier's states at confirmed tokens into keys and values of their own,
once, and keep them in the draft's cache. In each step it runs on a block: the last confirmed token
(the anchor), whose state is not there yet, and masks in place of the tokens to draft. A position of
the block attends to the context and to the block, and nothing of the block is kept (DFlash,
arXiv:2602.06036; PyPI's dflash 0.1.0, model.py).

All tokens of a block come from one pass. They may still be drawn one after the other, where the
logits of each depend on the token drafted before it (DSpark's Markov head, DFlash 2's selector).
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from speculators.decode.cache import BlockCache
from speculators.decode.drafter import Draft, Drafter
from speculators.decode.drawing import draw_drafted
from speculators.decode.sampling import Warp
from speculators.decode.tree import Tree, chain, shape_of
from speculators.errors import GenerationError

__all__ = ["ContextDraft", "ContextDrafter", "SequentialDraft"]


@runtime_checkable
class ContextDraft(Draft, Protocol):
    """A draft that attends to the verifier's states, and drafts a block of tokens in one pass."""

    @property
    def block_size(self) -> int:
        """How many positions a whole block has, the anchor's included."""

    @property
    def drafted_per_block(self) -> int:
        """How many tokens a whole block drafts, from its last positions."""

    @property
    def mask_token_id(self) -> int:
        """The token that stands for those that are not drafted yet, by the verifier's ids."""

    @abstractmethod
    def remember(
        self, verifier_states: Tensor, counts: Sequence[int] | Tensor, /, cache: BlockCache
    ) -> None:
        """Keep what the layers read of the verifier's states, and confirm it in the cache.

        Args:
            verifier_states: (rows, length, verifier width), at the tokens that follow those in the
                cache, padded at the right; in the verifier's dtype, on any device.
            counts: by row, the number of tokens without padding; a tensor while a CUDA graph is
                recorded.
            cache: the draft's.

        """

    @abstractmethod
    def run_block(self, tokens: Tensor, /, cache: BlockCache) -> Tensor:
        """Run on a block after the context in the cache, where nothing of it is confirmed.

        Args:
            tokens: (rows, positions), the anchors and masks, by the verifier's ids.
            cache: the draft's.

        Returns:
            what ``logits`` takes, (rows, positions, draft width).

        """


@runtime_checkable
class SequentialDraft(ContextDraft, Protocol):
    """A draft whose logits of a token depend on those drafted before it in the block."""

    @abstractmethod
    def condition(
        self, logits: Tensor, states: Tensor, before: Tensor, memory: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]:
        """The logits of a token, given the token before it.

        Args:
            logits: (rows, draft vocabulary), of its position by itself.
            states: (rows, draft width), the output that they were made from.
            before: (rows, 1), the token before it, by the verifier's ids.
            memory: what this returned for that token; ``None`` for the first token of a block.

        Returns:
            the conditioned logits, (rows, draft vocabulary), minus infinity for what it rules out;
            and what to pass on for the next token.

        """


class ContextDrafter(Drafter):
    """Proposes chains from one pass over a block.

    Each token comes with the state at the token before it. So the states of the newly confirmed
    tokens are the context that is new, up to the last of these tokens, which is the anchor.

    Args:
        draft: the model.
        cache: an empty one.
        length: the number of tokens to draft. The block is only as long as they need: as in the
            reference (dflash 0.1.0, ``dflash_generate``) and in vLLM, a shorter chain comes from a
            shorter block.
        warp: shapes the distributions that tokens are sampled from; the best ones are taken if not
            given.

    Raises:
        GenerationError: if a block does not have so many tokens.

    """

    draft: ContextDraft

    def __init__(
        self, draft: ContextDraft, cache: BlockCache, length: int, warp: Warp | None = None
    ) -> None:
        if length > draft.drafted_per_block:
            raise GenerationError(
                f"{type(draft).__name__} drafts up to {draft.drafted_per_block} tokens in a block, "
                f"not {length}; choose fewer draft tokens."
            )
        super().__init__(draft, cache, deepest=length, reach=1 + length)
        self.length, self.warp = length, warp
        self.masks = length - 1 + draft.block_size - draft.drafted_per_block
        self.shape = shape_of(chain(length), draft.device)

    def prefill(self, tokens: Tensor, states: Tensor) -> None:
        """See ``Drafter``."""
        self.draft.remember(states, [tokens.shape[1]] * len(tokens), self.cache)

    def propose(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tree:
        """See ``Drafter``."""
        self.draft.remember(states, counts, self.cache)
        anchors = tokens.gather(1, torch.as_tensor(counts, device=tokens.device)[:, None] - 1)
        outputs = self.run(anchors)
        logits = self.draft.logits(outputs).to(self.draft.device)
        if isinstance(self.draft, SequentialDraft):
            drafted, probabilities = self._draw_in_turn(self.draft, anchors, outputs, logits)
        else:
            rows = (len(anchors), self.length)
            flat, over_all = self._draw(logits.flatten(0, 1))
            drafted = flat.view(rows)
            probabilities = None if over_all is None else over_all.unflatten(0, rows)
        return self.shape.tree(torch.cat((anchors, drafted), 1), probabilities)

    def run(self, anchors: Tensor) -> Tensor:
        """Run the draft on a block after the context in its cache.

        Args:
            anchors: (rows, 1).

        Returns:
            the outputs that tokens are drafted from, (rows, length, draft width).

        """
        masks = anchors.new_full((len(anchors), self.masks), self.draft.mask_token_id)
        block = self.draft.run_block(torch.cat((anchors, masks), 1), self.cache)
        return block[:, -self.length :]

    def _draw_in_turn(
        self, draft: SequentialDraft, anchors: Tensor, outputs: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Draw each token given the one before it; the result is as of ``_draw``, for all."""
        before, memory = anchors, None
        drafted, distributions = [], []
        for place in range(self.length):
            conditioned, memory = draft.condition(
                logits[:, place], outputs[:, place], before, memory
            )
            before, probabilities = self._draw(conditioned)
            drafted.append(before)
            distributions.append(probabilities)
        sampled = [one for one in distributions if one is not None]
        return torch.cat(drafted, 1), torch.stack(sampled, 1) if sampled else None

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take the best token of each row, or sample one.

        Returns:
            tokens, (rows, 1), by the verifier's ids; and the distributions that they were sampled
            from, (rows, verifier vocabulary), if they were.

        """
        if self.warp is None:
            return self.draft.to_verifier(logits.argmax(-1, keepdim=True)), None
        return draw_drafted(self.draft, self.warp, logits)
