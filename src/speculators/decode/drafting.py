"""Proposing tokens with an EAGLE draft.

Position t of the draft pairs the verifier's hidden state at token t with token t+1, and its
output predicts token t+2 (EAGLE, arXiv:2401.15077, section 4.1). Where the verifier has not been
yet, the draft's own output takes the place of the hidden state; once it has been there, the
position is computed again with the true one, so that the draft's cache only keeps such.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from speculators.decode.cache import BlockCache
from speculators.decode.sampling import Warp, draw
from speculators.decode.tree import (
    EAGLE1_TREE,
    Level,
    Path,
    Tree,
    ancestors_of,
    chain,
    shape_of,
)
from speculators.errors import GenerationError
from speculators.format.config import PROPOSALS, ProposalMethod

__all__ = ["Draft", "Drafter", "drafter_of"]


class Draft(Protocol):
    """What is asked of a draft; ``models.eagle.EagleSpeculator`` is one."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    def draft(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Any:
        """Tokens and hidden states → an output with ``last_hidden_state``."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """``last_hidden_state``, or a part of it → logits."""


class Drafter(ABC):
    """A draft, its cache, and a way of proposing.

    Args:
        draft: the model.
        cache: an empty one.
        deepest: how many levels its proposals have below their root at most.
        reach: how many slots a step takes at most behind those confirmed in the longest cache.

    Attributes:
        warp: what shapes the distribution that proposals are drawn from; ``None`` if they are not
            drawn.

    """

    warp: Warp | None = None

    def __init__(self, draft: Draft, cache: BlockCache, deepest: int, reach: int) -> None:
        self.draft = draft
        self.cache = cache
        self.deepest = deepest
        self.reach = reach

    def take_in(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Take in what the verifier has confirmed.

        Args:
            tokens: (rows, length), the confirmed tokens that the draft has not seen, padded at
                the right.
            states: (rows, length, hidden), the verifier's hidden state before each of them.
            counts: by row, how many they are.

        Returns:
            the draft's outputs, (rows, length, hidden).

        """
        depths = torch.arange(tokens.shape[1], device=tokens.device)[None]
        output = self._run(tokens, states, depths)
        self.cache.confirm(counts)
        return output

    def propose(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tree:
        """Take in what the verifier has confirmed, and propose what may follow the last token.

        The arguments are as for ``take_in``.
        """
        output = self.take_in(tokens, states, counts)
        ends = torch.as_tensor(counts, device=tokens.device)[:, None] - 1
        state = output.gather(1, ends[:, :, None].expand(-1, -1, output.shape[2]))
        tree = self._grow(tokens.gather(1, ends), state, self._logits(state))
        self.cache.tried = 0  # none of it had the verifier's hidden states
        return tree

    @abstractmethod
    def _grow(self, root: Tensor, state: Tensor, logits: Tensor) -> Tree:
        """Propose what may follow tokens, (rows, 1), of the draft's outputs at them.

        Args:
            root: the tokens.
            state: (rows, 1, hidden).
            logits: (rows, 1, vocabulary).

        """

    def _extend(
        self, tokens: Tensor, states: Tensor, depth: int, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Draft on from the nodes of a depth: their tokens and parents' states → theirs, logits."""
        states = self._run(tokens, states, depth - 1, visible)
        self.cache.tried += tokens.shape[1]
        return states, self._logits(states)

    def _run(
        self, tokens: Tensor, states: Tensor, depths: Tensor | int, visible: Tensor | None = None
    ) -> Tensor:
        """The draft's outputs at new positions.

        Args:
            tokens: (rows, positions).
            states: (rows, positions, hidden).
            depths: (1, positions), how far they are behind what is confirmed; one for all.
            visible: as the block of ``BlockCache.mask``; ``None`` if each sees all before it.

        """
        device = self.draft.device
        output: Tensor = self.draft.draft(
            tokens,
            states,
            attention_mask=self.cache.mask(
                tokens.shape[1], self.draft.dtype, device, block=visible
            ),
            position_ids=self.cache.positions(depths, device).expand(-1, tokens.shape[1]),
            past_key_values=self.cache,
        ).last_hidden_state
        return output

    def _logits(self, states: Tensor) -> Tensor:
        return self.draft.logits(states).to(self.draft.device)


class ShapeDrafter(Drafter):
    """Proposes trees of one shape."""

    def __init__(self, draft: Draft, cache: BlockCache, paths: tuple[Path, ...]) -> None:
        deepest = max(map(len, paths))
        super().__init__(draft, cache, deepest, reach=1 + deepest + len(paths))
        self.shape = shape_of(paths, draft.device)

    def _grow(self, root: Tensor, state: Tensor, logits: Tensor) -> Tree:
        tokens = [root]
        for depth, level in enumerate(self.shape.levels, start=1):
            drafted = self._children(logits, level)
            tokens.append(drafted)
            if len(level.inner):
                if not level.is_link:
                    drafted = drafted[:, level.inner]
                    state = state[:, level.parents[level.inner]]
                state, logits = self._extend(drafted, state, depth, level.visible)
        return Tree(
            tokens=torch.cat(tokens, 1),
            parents=self.shape.parents,
            depths=self.shape.depths,
            ancestors=self.shape.ancestors,
            is_chain=self.shape.is_chain,
        )

    def _children(self, logits: Tensor, level: Level) -> Tensor:
        """The tokens of a level's nodes: (rows, inner nodes above, vocabulary) → (rows, nodes)."""
        if level.is_link:
            return logits.argmax(-1)
        return logits.topk(level.width).indices[:, level.parents, level.ranks]


CANDIDATES = 1024
"""How many of the draft's best tokens a proposal is drawn from.

Any distribution will do that is told to the verifier as it is. That of the best tokens is much
cheaper to shape, most of all by ``top_p``, which sorts it, and is accepted about as often.
"""


class DrawnChainDrafter(ShapeDrafter):
    """Proposes chains that are drawn from the draft's distribution over its best tokens."""

    warp: Warp

    def __init__(self, draft: Draft, cache: BlockCache, length: int, warp: Warp) -> None:
        super().__init__(draft, cache, chain(length))
        self.warp = warp
        self.probabilities: list[Tensor] = []

    def _grow(self, root: Tensor, state: Tensor, logits: Tensor) -> Tree:
        self.probabilities = []
        tree = super()._grow(root, state, logits)
        return replace(tree, probabilities=torch.stack(self.probabilities, 1))

    def _children(self, logits: Tensor, level: Level) -> Tensor:
        del level  # it has one node
        logits = logits[:, 0]
        best, tokens = logits.topk(min(CANDIDATES, logits.shape[1]))
        q = self.warp(best.float()).softmax(-1)
        self.probabilities.append(q.new_zeros(logits.shape).scatter(1, tokens, q))
        return tokens.gather(1, draw(q))


class DynamicDrafter(Drafter):
    """Grows trees towards the most probable tokens (EAGLE-2, arXiv:2406.16858, section 4).

    As the reference does (SafeAILab/EAGLE, eagle/model/cnets1.py, ``topK_genrate``): the score of
    a node is the probability of the tokens up to it; of each level the ``top_k`` best nodes are
    given ``top_k`` children each; the best nodes of all levels make up the tree.
    """

    def __init__(self, draft: Draft, cache: BlockCache, nodes: int, depth: int, top_k: int) -> None:
        reach = 2 + depth + max(nodes, depth * top_k)
        super().__init__(draft, cache, deepest=1 + depth, reach=reach)
        self.nodes, self.depth, self.top_k = nodes, depth, top_k

    def _grow(self, root: Tensor, state: Tensor, logits: Tensor) -> Tree:
        rows, k = len(root), self.top_k
        if k > logits.shape[2]:
            raise GenerationError(
                f"tree_top_k {k} is more than the {logits.shape[2]} tokens of the vocabulary."
            )
        score, token = self._best(logits)  # (rows, 1, k)
        place = torch.arange(k, device=root.device).expand(rows, k)
        itself = torch.eye(k, dtype=torch.bool, device=root.device).expand(rows, k, k)
        # The candidates, level by level; a parent is told by its place among them plus one, the
        # root being 0.
        scores, tokens, parents = [score[:, 0]], [token[:, 0]], [torch.zeros_like(place)]
        frontier_score, frontier_token = scores[0], tokens[0]
        states, visible = state.expand(-1, k, -1), itself
        for depth in range(1, self.depth + 1):
            states, logits = self._extend(frontier_token, states, depth, visible)
            score, token = self._best(logits)  # (rows, k, k)
            scores.append((frontier_score[:, :, None] + score).flatten(1))
            tokens.append(token.flatten(1))
            parents.append(1 + place.repeat_interleave(k, 1))
            # The next frontier, and which of this one each of its nodes comes from.
            frontier_score, best = scores[-1].topk(k)
            frontier_token = tokens[-1].gather(1, best)
            above = best // k
            place = k + (depth - 1) * k * k + best
            states = states.gather(1, above[:, :, None].expand_as(states))
            visible = torch.cat(
                (visible.gather(1, above[:, :, None].expand_as(visible)), itself), 2
            )
        return self._best_nodes(
            root, torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents, 1)
        )

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens of the best: (rows, nodes, top_k) of logits."""
        best = logits.topk(self.top_k)
        # As ``logsumexp`` would, but with the largest logit known.
        values = best.values.float()
        largest = values[..., :1]
        total = (logits - largest).exp_().sum(-1, keepdim=True)
        return values - largest - total.log_(), best.indices

    def _best_nodes(self, root: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor) -> Tree:
        """The tree of the best candidates, all (rows, candidates)."""
        # Stable, so that of equals a parent is taken before its child.
        order = scores.sort(dim=1, descending=True, stable=True).indices
        kept = order[:, : self.nodes].sort(dim=1).values
        above = parents.gather(1, kept)
        to_root = torch.zeros_like(root)
        among_kept = 1 + torch.searchsorted(kept, above - 1)
        parents = torch.cat((to_root, among_kept.where(above > 0, 0)), 1)
        ancestors = ancestors_of(parents)
        return Tree(
            tokens=torch.cat((root, tokens.gather(1, kept)), 1),
            parents=parents,
            depths=ancestors.sum(2) - 1,
            ancestors=ancestors,
        )


def drafter_of(draft: Draft, cache: BlockCache, method: ProposalMethod, warp: Warp) -> Drafter:
    """What proposes by a method.

    Args:
        draft: the model.
        cache: an empty one.
        method: its type and sizes.
        warp: for proposals that are drawn.

    Raises:
        GenerationError: if the type is unknown or the sizes are impossible.

    """
    size, depth, top_k = method.speculative_tokens, method.tree_depth, method.tree_top_k
    match method.proposal_type:
        case "greedy":
            return ShapeDrafter(draft, cache, chain(size))
        case "sampling":
            return DrawnChainDrafter(draft, cache, size, warp)
        case "static_tree":
            if size != len(EAGLE1_TREE):
                raise GenerationError(
                    f"The static tree has {len(EAGLE1_TREE)} tokens, not {size}: "
                    f"set speculative_tokens to {len(EAGLE1_TREE)}, or leave it out."
                )
            return ShapeDrafter(draft, cache, EAGLE1_TREE)
        case "dynamic_tree":
            assert depth is not None
            assert top_k is not None
            candidates = top_k + depth * top_k**2
            if size > candidates:
                raise GenerationError(
                    f"A tree with tree_depth {depth} and tree_top_k {top_k} has {candidates} "
                    f"candidates, too few for {size} speculative_tokens; change one of them."
                )
            return DynamicDrafter(draft, cache, size, depth, top_k)
        case unknown:
            raise GenerationError(
                f"Unknown proposal type {unknown!r}: one of {', '.join(PROPOSALS)} is expected."
            )
