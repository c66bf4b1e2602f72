"""Drafting along known texts with a draft that attends to the verifier's states, as DFlash's.

What a block drafts depends on the context before its anchor, and on the block. So the context of
each text is computed once, and blocks are run at its roots, the anchors, many at a time. A chain of
another length comes from a block of another length, which is run for itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from speculators.decode.cache import BlockCache
from speculators.decode.context import ContextDraft, ContextDrafter, SequentialDraft
from speculators.decode.sampling import Warp
from speculators.decode.tree import Path
from speculators.evaluate.recording.drafting import LOGITS, DraftedTexts, Roots, Survival
from speculators.evaluate.recording.texts import Text

__all__ = ["ContextTexts"]

SLOTS = 1 << 14
"""How many slots of context and of blocks are attended to at a time, over all roots."""

Accept = Callable[[Roots, int, Tensor, Tensor], Tensor]
"""From roots, a depth from 1, the logits there, (roots, draft vocabulary), and the text's tokens
there, (roots), to the probabilities that these were drafted and accepted, (roots)."""


class RootCache(BlockCache):
    """The context of some texts as roots see it, each in a row of its own.

    A block is attended to, but not kept. The context is only read where it is: a layer's at a time.

    Args:
        context: a row for each text.
        roots: the anchors.

    """

    def __init__(self, context: BlockCache, roots: Roots) -> None:
        super().__init__([0] * len(roots))
        self.context, self.rows = context, roots.rows
        self.lengths = roots.tokens.tolist()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values up to the block's end, (roots, heads, slots, head size)."""
        known: Any = self.context.layers[layer_idx]
        length, device = key_states.shape[2], key_states.device
        rows, end = self.rows.to(device), self.end(length)
        keys, values = known.keys[rows, :, :end], known.values[rows, :, :end]
        self.write(keys, values, key_states, value_states, self.next_slots(length, device))
        return keys, values


class ContextTexts(DraftedTexts):
    """What a draft with a context makes of some texts; see ``DraftedTexts``."""

    draft: ContextDraft

    def __init__(self, draft: ContextDraft, texts: Sequence[Text]) -> None:
        super().__init__(draft, texts)
        states = self.states()
        self.slots = states.shape[1] + draft.block_size
        self.context = BlockCache([0] * len(texts))
        self.context.reserve(self.slots, len(texts))
        draft.remember(states, [states.shape[1]] * len(texts), cache=self.context)

    def survival(self, paths: Sequence[Sequence[Path]]) -> list[list[Survival]]:
        """See ``DraftedTexts``."""

        def is_best(roots: Roots, depth: int, logits: Tensor, tokens: Tensor) -> Tensor:
            del roots, depth
            return self.draft.to_verifier(logits.argmax(-1)) == tokens

        return [self._follow(len(chain), is_best, torch.long) for chain in paths]

    def sampled_survival(self, lengths: Sequence[int], warp: Warp) -> list[list[Survival]]:
        """See ``DraftedTexts``."""

        def chance(roots: Roots, depth: int, logits: Tensor, tokens: Tensor) -> Tensor:
            return self.accepted(self.chances(logits, tokens, warp), roots, depth)

        return [self._follow(length, chance, torch.float32) for length in lengths]

    def _follow(self, length: int, accept: Accept, dtype: torch.dtype) -> list[Survival]:
        """The probabilities that tokens of chains after all roots are accepted, by text.

        Args:
            length: of the chains.
            accept: called for each depth, with the roots of which all before may be accepted.
            dtype: of the probabilities.

        """
        found: list[Survival] = [[] for _ in self.texts]
        for roots in self._portions():
            # By depth, from 0.
            chances = torch.zeros(len(roots), 1 + length, dtype=dtype, device=roots.rows.device)
            chances[:, 0] = 1
            drafter = ContextDrafter(self.draft, RootCache(self.context, roots), length)
            before = self.tokens[roots.rows, roots.tokens][:, None]
            outputs, memory = drafter.run(before), None
            alive = torch.arange(len(roots), device=before.device)
            for depth in range(1, 1 + length):
                at, states = roots[alive], outputs[alive, depth - 1]
                logits = self.draft.logits(states[None])[0].to(before.device)
                if isinstance(self.draft, SequentialDraft):
                    logits, memory = self.draft.condition(logits, states, before, memory)
                tokens = self.tokens[at.rows, at.tokens + depth]
                accepted = accept(at, depth, logits, tokens)
                chances[alive, depth] = chances[alive, depth - 1] * accepted
                going_on = accepted > 0
                alive, before = alive[going_on], tokens[going_on][:, None]
                memory = None if memory is None else memory[going_on]
                if not len(alive):
                    break
            for row, chance in zip(roots.rows.tolist(), chances.tolist(), strict=True):
                found[row].append(chance[1:])
        return found

    def _portions(self) -> Iterator[Roots]:
        """All roots, text by text, as many at a time as memory allows."""
        size = max(1, min(SLOTS // self.slots, LOGITS // self.draft.verifier_vocab_size))
        rows, tokens = list[int](), list[int]()
        for row, text in enumerate(self.texts):
            rows += [row] * (text.new_tokens - 1)
            tokens += range(text.prompt_tokens, text.prompt_tokens + text.new_tokens - 1)
        every = Roots(*(torch.tensor(it, device=self.tokens.device) for it in (rows, tokens)))
        for start in range(0, len(every), size):
            yield every[start : start + size]
