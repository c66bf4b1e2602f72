"""Drafting along known texts with a draft that is fed its own output, as EAGLE drafts are.

What follows a root is fed the text's own tokens: step by step, for all roots at once, while their
drafted tokens are right.

Slot s of the draft's cache pairs token s + 1 of the text with the verifier's state at token s. So a
root at token r is slot r - 1, and sees r slots of text. What is drafted after roots is kept behind
the text in the cache. Each drafted token sees the text up to its root, and those before it that
were drafted from the same root.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speculators.decode.block import BlockDraft
from speculators.decode.cache import BlockCache
from speculators.decode.recurrent import DynamicTreeDrafter, RecurrentDraft, run_draft
from speculators.decode.sampling import Warp
from speculators.decode.tree import Path, Tree
from speculators.decode.verification import children_of, depth_of, known_choice, walk
from speculators.evaluate.recording.drafting import LOGITS, DraftedTexts, Roots, Survival
from speculators.evaluate.recording.texts import Text

__all__ = ["RecurrentTexts"]

ROOTS = 128
"""How many roots of a text are drafted from at a time."""


class TextCache(BlockCache):
    """The keys and values of several texts, each in one row, and of what is drafted behind them.

    Rows begin with the first slot of their text. ``lengths`` are the slots of text that the next
    block sees; blocks are kept from ``text`` on.

    Attributes:
        text: the number of slots of the longest text, once all are there.

    """

    text = 0

    @property
    def is_aligned(self) -> bool:
        """True: a block starts at the same slot in every row."""
        return True

    @property
    def is_dense(self) -> bool:
        """Whether slots equal positions, which is so while the texts are written."""
        return self.text == 0

    @property
    def start(self) -> int:
        """The first slot of the next block."""
        return self.text + self.unconfirmed

    def mask(
        self,
        queries: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        block: Tensor | None = None,
        window: int | None = None,
        depths: Tensor | None = None,
    ) -> Tensor | None:
        """See ``BlockCache``; ``window`` and ``depths`` are not used by drafts."""
        del window, depths
        if self.is_dense:
            return None
        rows, nodes = len(self.lengths), self.unconfirmed + queries
        if block is None:
            block = torch.ones(1, queries, nodes, dtype=torch.bool, device=device)
            block = block.tril(self.unconfirmed)
        seen = self.starts(device)[:, :, None].expand(-1, queries, -1)
        return self.block_mask(seen, block.expand(rows, -1, -1), dtype)

    def block_mask(self, seen: Tensor, block: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask, to be added to attention scores.

        Args:
            seen: (rows, queries, 1), how many slots of text each query sees.
            block: (rows, queries, nodes), whether it sees each of the slots behind the text.
            dtype: of the mask.

        Returns:
            (rows, 1, queries, slots), zero or the lowest number of the dtype.

        """
        hidden = torch.arange(self.text, device=seen.device) >= seen
        hidden = torch.cat((hidden, ~block), -1)
        return (hidden.to(dtype) * torch.finfo(dtype).min)[:, None]


class ScoredTreeDrafter(DynamicTreeDrafter):
    """Grows the same trees as a ``DynamicTreeDrafter``, without what cannot become part of them.

    A node's score is never above its parent's. So what is no better than the worst of the best
    candidates so far, as many as the tree has nodes, has no descendant in the tree.
    """

    def _expand(
        self,
        tokens: Tensor,
        states: Tensor,
        depth: int,
        visible: Tensor | None,
        scores: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``DynamicTreeDrafter``."""
        rows, k = tokens.shape
        score = states.new_full((rows, k, k), -torch.inf, dtype=torch.float32)
        token = tokens.new_zeros(rows, k, k)
        every = torch.cat(list(scores), 1)
        growing = torch.ones_like(tokens, dtype=torch.bool)
        if every.shape[1] >= self.nodes:
            worst = every.topk(self.nodes).values[:, -1:]
            growing = scores[-1].topk(k).values > worst
        if growing.any():
            # All of a level go through the draft, which is cheap; the head is not.
            states = run_draft(self.draft, self.cache, tokens, states, depth - 1, visible)
            self.cache.unconfirmed += k
            score[growing], token[growing] = (
                it[0] for it in self._best(self._logits(states[growing][None]))
            )
        return states, score, token

    def grow(self, root: Tensor, state: Tensor) -> Tree:
        """The trees after roots.

        Args:
            root: (rows, 1), their tokens.
            state: (rows, 1, draft width), the draft's outputs at them.

        """
        tree = self._grow(root, state, self._logits(state))
        self.cache.unconfirmed = 0
        return tree


class RecurrentTexts(DraftedTexts):
    """What a recurrent draft makes of some texts; see ``DraftedTexts``."""

    draft: RecurrentDraft

    def __init__(self, draft: RecurrentDraft, texts: Sequence[Text]) -> None:
        super().__init__(draft, texts)
        device, states = draft.device, self.states()
        self.cache = TextCache([0] * len(texts))
        length = states.shape[1]
        self.outputs: Tensor = draft.draft(
            self.tokens[:, 1 : 1 + length],
            draft.project(states),
            position_ids=torch.arange(length, device=device)[None].expand(len(texts), -1),
            past_key_values=self.cache,
        ).last_hidden_state
        self.cache.text = length

    def survival(self, paths: Sequence[Sequence[Path]]) -> list[list[Survival]]:
        """See ``DraftedTexts``."""
        union = Trie([path for tree in paths for path in tree])
        found: list[list[int]] = [[] for _ in self.texts]
        for roots in self._roots():
            ends = torch.zeros_like(roots.rows)  # the node of the trie that each text gets to

            def match(
                alive: Tensor, depth: int, states: Tensor, drafted: Tensor, ends: Tensor = ends
            ) -> Tensor:
                del depth
                ranks = self._ranks(states, drafted, union.width)
                reached = union.children.to(ranks.device)[ends[alive], ranks]
                ends[alive] = torch.where(reached > 0, reached, ends[alive])
                return union.is_inner.to(ranks.device)[reached] & (reached > 0)

            self._follow(roots, match)
            for row, end in zip(roots.rows.tolist(), ends.tolist(), strict=True):
                found[row].append(end)
        return [
            [[union.survival(tree, end) for end in ends] for ends in found]
            for tree in map(set, paths)
        ]

    def sampled_survival(self, lengths: Sequence[int], warp: Warp) -> list[list[Survival]]:
        """See ``DraftedTexts``; shorter chains are the first tokens of the longest one."""
        found: list[Survival] = [[] for _ in self.texts]
        length = max(lengths)
        for roots in self._roots():
            # By depth, from 0.
            chances = torch.zeros(len(roots), 1 + length, device=roots.rows.device)
            chances[:, 0] = 1

            def match(
                alive: Tensor,
                depth: int,
                states: Tensor,
                drafted: Tensor,
                roots: Roots = roots,
                chances: Tensor = chances,
            ) -> Tensor:
                at = roots[alive]
                accepted = self._sampled(at, depth, states, drafted, warp)
                chances[alive, depth] = chances[alive, depth - 1] * accepted
                return (chances[alive, depth] > 0) & (depth < length)

            self._follow(roots, match)
            for row, chance in zip(roots.rows.tolist(), chances.tolist(), strict=True):
                found[row].append(chance[1:])
        return [
            [[chances[:length] for chances in survival] for survival in found] for length in lengths
        ]

    def grown(self, nodes: int, depth: int, top_k: int) -> list[tuple[list[int], list[int]]]:
        """The steps of decoding with trees that grow towards the most probable tokens.

        Texts are dropped as they end, so this can be asked only once, and nothing else after it.

        Args:
            nodes: as for ``DynamicTreeDrafter``, like the others.
            depth: likewise.
            top_k: likewise.

        Returns:
            by text and step, how many tokens are accepted, and how many could be.

        """
        accepted: list[list[int]] = [[] for _ in self.texts]
        offered: list[list[int]] = [[] for _ in self.texts]
        drafter = ScoredTreeDrafter(self.draft, self.cache, nodes, depth, top_k)
        tokens = [text.tokens.tolist() for text in self.texts]
        roots = {row: text.prompt_tokens for row, text in enumerate(self.texts)}
        while roots:
            rows, places = list(roots), torch.tensor([*roots.values()], device=self.tokens.device)
            drafter.cache.lengths = [*roots.values()]
            tree = drafter.grow(
                self.tokens[rows, places][:, None], self.outputs[rows, places - 1][:, None]
            )
            packed = torch.stack((tree.tokens, tree.parents)).tolist()
            for row, drafted, parents in zip(rows, *packed, strict=True):
                following = tokens[row][roots[row] + 1 :]
                path, _ = walk(children_of(drafted, parents), known_choice(following))
                accepted[row].append(len(path) - 1)
                offered[row].append(depth_of(parents))
                roots[row] += len(path)
            going_on = [
                place for place, row in enumerate(rows) if roots[row] < self._end(self.texts[row])
            ]
            if len(going_on) < len(rows):
                roots = {rows[place]: roots[rows[place]] for place in going_on}
                if roots:
                    drafter.cache.select(going_on)
        return list(zip(accepted, offered, strict=True))

    @staticmethod
    def _end(text: Text) -> int:
        """The token with which a text ends; no step starts there."""
        return text.prompt_tokens + text.new_tokens - 1

    def _roots(self) -> list[Roots]:
        """All roots, in portions that can be drafted from at a time, with some of each text."""
        counts = [text.new_tokens - 1 for text in self.texts]
        portions = []
        for start in range(0, max(counts), ROOTS):
            rows, tokens = list[int](), list[int]()
            for row, text in enumerate(self.texts):
                places = range(start, min(start + ROOTS, counts[row]))
                rows += [row] * len(places)
                tokens += [text.prompt_tokens + place for place in places]
            device = self.tokens.device
            portions.append(Roots(*(torch.tensor(it, device=device) for it in (rows, tokens))))
        return portions

    def _follow(self, roots: Roots, match: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> None:
        """Go down the texts from roots, as long as what is drafted is accepted.

        Args:
            roots: the roots.
            match: called for each depth, from 1, with the indices of the roots that got there; the
                depth; the draft's outputs there, (roots, draft width); and the texts' tokens that
                they should predict, (roots). It returns which of them go on, (roots).

        """
        cache, draft = self.cache, self.draft
        alive = torch.arange(len(roots), device=roots.rows.device)
        states = self.outputs[roots.rows, roots.tokens - 1]
        behind = alive[:, None][:, :0]  # by root, the slots behind the text that are its own
        cache.unconfirmed = 0
        depth = 1
        while True:
            at = roots[alive]
            drafted = self.tokens[at.rows, at.tokens + depth]
            going_on = match(alive, depth, states, drafted)
            alive, at = alive[going_on], at[going_on]
            if not len(alive):
                break
            states, behind, drafted = states[going_on], behind[going_on], drafted[going_on]
            if isinstance(draft, BlockDraft):
                drafted = torch.full_like(drafted, draft.mask_token_id)
                states = draft.mask_state()[0].expand(len(alive), -1)
            states, behind = self._step(at, depth, drafted, states, behind)
            depth += 1
        cache.unconfirmed = 0

    def _step(
        self, at: Roots, depth: int, drafted: Tensor, states: Tensor, behind: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the draft on one more token after each root.

        Args:
            at: the roots.
            depth: of the tokens.
            drafted: (roots), the tokens.
            states: (roots, draft width), the draft's outputs at those before them.
            behind: (roots, depth - 1), the slots behind the text of those before them.

        Returns:
            the draft's outputs, (roots, draft width), and the slots, (roots, depth).

        """
        cache, rows, device = self.cache, len(self.texts), at.rows.device
        # One row for each text: the place of each root in it.
        order = torch.zeros(len(at), dtype=torch.long, device=device)
        for row in range(rows):
            here = at.rows == row
            order[here] = torch.arange(int(here.sum()), device=device)
        width = int(order.max()) + 1
        place = (at.rows, order)
        behind = torch.cat((behind, (cache.unconfirmed + order)[:, None]), 1)

        tokens = drafted.new_zeros(rows, width)
        tokens[place] = drafted
        inputs = states.new_zeros(rows, width, states.shape[1])
        inputs[place] = states
        # What fills up a row sees the first slot, so that it sees something.
        seen = at.tokens.new_ones(rows, width)
        seen[place] = at.tokens
        visible = torch.zeros(len(at), cache.unconfirmed + width, dtype=torch.bool, device=device)
        visible.scatter_(1, behind, value=True)
        block = visible.new_zeros(rows, width, visible.shape[1])
        block[place] = visible
        output: Tensor = self.draft.draft(
            tokens,
            inputs,
            attention_mask=cache.block_mask(seen[:, :, None], block, self.draft.dtype),
            position_ids=seen + depth - 1,
            past_key_values=cache,
        ).last_hidden_state
        cache.unconfirmed += width
        return output[place], behind

    def _ranks(self, states: Tensor, drafted: Tensor, width: int) -> Tensor:
        """How many of the draft's tokens are better than the text's; ``width`` if as many as that.

        Args:
            states: (roots, draft width), the draft's outputs.
            drafted: (roots), the text's tokens.
            width: the number of best tokens that are looked at.

        """

        def ranks(states: Tensor, drafted: Tensor) -> Tensor:
            logits = self._logits(states)
            best = logits.argmax(-1, keepdim=True) if width == 1 else logits.topk(width).indices
            same = self.draft.to_verifier(best) == drafted[:, None]
            none = torch.ones_like(same[:, :1])
            return torch.cat((same, none), 1).int().argmax(1)

        return self._in_portions(ranks, states, drafted)

    def _sampled(
        self, at: Roots, depth: int, states: Tensor, drafted: Tensor, warp: Warp
    ) -> Tensor:
        """``DraftedTexts.accepted`` of tokens that are sampled; arguments as for ``_ranks``."""
        q = self._in_portions(
            lambda states, drafted: self.chances(self._logits(states), drafted, warp),
            states,
            drafted,
        )
        return self.accepted(q, at, depth)

    def _logits(self, states: Tensor) -> Tensor:
        return self.draft.logits(states[None])[0].to(self.draft.device)

    def _in_portions(
        self, compute: Callable[[Tensor, Tensor], Tensor], states: Tensor, drafted: Tensor
    ) -> Tensor:
        """Compute something that takes logits, for as many roots at a time as memory allows."""
        size = max(1, LOGITS // self.draft.verifier_vocab_size)
        parts = zip(states.split(size), drafted.split(size), strict=True)
        return torch.cat([compute(*part) for part in parts])


class Trie:
    """The union of trees, as tables.

    Args:
        paths: the nodes of all trees; with each, its prefixes.

    Attributes:
        width: one more than the highest rank.
        children: (nodes, width + 1), the child of each rank, 0 if there is none; node 0 is the
            root, and rank ``width`` has none.
        is_inner: (nodes), whether a node has children.

    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.nodes: list[Path] = [(), *sorted({*paths}, key=lambda path: (len(path), path))]
        self.width = 1 + max(path[-1] for path in self.nodes[1:])
        place = {path: index for index, path in enumerate(self.nodes)}
        self.children = torch.zeros(len(self.nodes), self.width + 1, dtype=torch.long)
        for path in self.nodes[1:]:
            self.children[place[path[:-1]], path[-1]] = place[path]
        self.is_inner = (self.children > 0).any(1)

    def survival(self, tree: set[Path], node: int) -> list[int | float]:
        """By depth, whether a tree has the node, or the one above it there.

        Args:
            tree: one of the trees.
            node: the node of the union.

        """
        path = self.nodes[node]
        deepest = max(map(len, tree))
        return [int(depth <= len(path) and path[:depth] in tree) for depth in range(1, deepest + 1)]
