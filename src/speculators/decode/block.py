"""Drafting a chain in one pass with a draft that stands in for what is not there yet, as P-EAGLE's.

The draft runs on the confirmed tokens, as a recurrent draft does, and in the same pass on positions
with a mask token and a mask state. The first drafted token follows from the last confirmed one, and
each further one from a mask (PyPI's speculators 0.9.0, models/peagle/core.py). Masks are not kept
in the cache. No drafted token depends on another, given the confirmed ones: they make up a chain,
and a sampled one has one distribution for each position.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from speculators.decode.cache import BlockCache
from speculators.decode.drafter import Drafter
from speculators.decode.drawing import draw_drafted
from speculators.decode.recurrent import RecurrentDraft, run_draft
from speculators.decode.sampling import Warp
from speculators.decode.tree import Tree, chain, shape_of

__all__ = ["BlockDraft", "BlockDrafter", "SampledBlockDrafter"]


@runtime_checkable
class BlockDraft(RecurrentDraft, Protocol):
    """A draft that also runs on masks, which stand for tokens and states that are not there yet."""

    @property
    def mask_token_id(self) -> int:
        """The token that stands for those that are not drafted yet, by the verifier's ids."""

    def mask_state(self) -> Tensor:
        """What stands for the projected states there, (1, 1, draft width)."""


class BlockDrafter(Drafter):
    """Proposes chains of the draft's best tokens, all from one pass."""

    draft: BlockDraft

    def __init__(self, draft: BlockDraft, cache: BlockCache, length: int) -> None:
        super().__init__(draft, cache, deepest=length, reach=2 * length)
        self.length = length
        self.shape = shape_of(chain(length), draft.device)

    def prefill(self, tokens: Tensor, states: Tensor) -> None:
        """See ``Drafter``."""
        depths = torch.arange(tokens.shape[1], device=tokens.device)[None]
        run_draft(self.draft, self.cache, tokens, self.draft.project(states), depths)
        self.cache.confirm([tokens.shape[1]] * len(tokens))

    def propose(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tree:
        """See ``Drafter``."""
        confirmed = torch.as_tensor(counts, device=tokens.device)[:, None]
        depths = torch.arange(tokens.shape[1] + self.length - 1, device=tokens.device)[None]
        places = confirmed - 1 + torch.arange(self.length, device=tokens.device)
        root = tokens.gather(1, confirmed - 1)
        # Masks also take the place of the padding of rows with fewer confirmed tokens.
        masked = depths >= confirmed
        tokens = torch.cat((tokens, tokens.new_zeros(len(tokens), self.length - 1)), 1)
        tokens = tokens.masked_fill(masked, self.draft.mask_token_id)
        mask, projected = self.draft.mask_state(), self.draft.project(states)
        projected = torch.cat((projected, mask.expand(len(tokens), self.length - 1, -1)), 1)
        projected = torch.where(masked[:, :, None], mask, projected)
        output = run_draft(self.draft, self.cache, tokens, projected, depths)
        self.cache.confirm(counts)
        drafted = output.gather(1, places[:, :, None].expand(-1, -1, output.shape[2]))
        return self._chain(root, self.draft.logits(drafted).to(self.draft.device))

    def _chain(self, root: Tensor, logits: Tensor) -> Tree:
        """The chain after each row's last token.

        Args:
            root: (rows, 1), the last tokens.
            logits: (rows, length, draft vocabulary), of what follows.

        """
        return self.shape.tree(torch.cat((root, self.draft.to_verifier(logits.argmax(-1))), 1))


class SampledBlockDrafter(BlockDrafter):
    """Proposes chains that are sampled from the draft's distributions, all from one pass."""

    warp: Warp

    def __init__(self, draft: BlockDraft, cache: BlockCache, length: int, warp: Warp) -> None:
        super().__init__(draft, cache, length)
        self.warp = warp

    def _chain(self, root: Tensor, logits: Tensor) -> Tree:
        tokens, probabilities = draw_drafted(self.draft, self.warp, logits.flatten(0, 1))
        rows = (len(root), self.length)
        return self.shape.tree(
            torch.cat((root, tokens.view(rows)), 1), probabilities.unflatten(0, rows)
        )
