"""Proposing tokens with an EAGLE draft.

Position t of the draft pairs the verifier's hidden state at token t with token t+1, and its
output predicts token t+2 (EAGLE, arXiv:2401.15077, section 4.1). Where the verifier has not run
yet, the draft's own output stands in for the hidden state. Once the verifier has run there, the
position is computed again with its hidden state, so the draft's cache keeps no stand-ins.
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
    """The interface of a draft, which ``models.eagle.EagleSpeculator`` implements."""

    @property
    def device(self) -> torch.device:
        """The device of its inputs and outputs."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""

    def draft(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Any:
        """Run the draft on tokens and hidden states; the output has ``last_hidden_state``."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The logits of ``last_hidden_state`` or a part of it."""


class Drafter(ABC):
    """A draft, its cache, and a way of proposing tokens.

    Args:
        draft: the model.
        cache: an empty one.
        deepest: the most levels that its proposals have below their root.
        reach: the most slots that a step takes in either cache, counted from the end of the
            confirmed slots of the longer one.

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

    def take_in(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Run the draft on tokens that the verifier has confirmed, and keep them in its cache.

        Args:
            tokens: (rows, length), the confirmed tokens that the draft has not seen, padded at
                the right.
            states: (rows, length, hidden), the verifier's hidden state at the token before each.
            counts: by row, the number of tokens without padding.

        Returns:
            the draft's outputs, (rows, length, hidden).

        """
        depths = torch.arange(tokens.shape[1], device=tokens.device)[None]
        output = self._run(tokens, states, depths)
        self.cache.confirm(counts)
        return output

    def propose(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tree:
        """Run the draft on newly confirmed tokens, and propose what may follow the last of them.

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
        """Propose what may follow each row's last token.

        Args:
            root: (rows, 1), the last tokens.
            state: (rows, 1, hidden), the draft's outputs at them.
            logits: (rows, 1, vocabulary), the logits of these outputs.

        """

    def _extend(
        self, tokens: Tensor, states: Tensor, depth: int, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the draft on nodes of one depth.

        Args:
            tokens: (rows, nodes).
            states: (rows, nodes, hidden), the draft's outputs at their parents.
            depth: of the nodes.
            visible: as for ``_run``.

        Returns:
            the draft's outputs at the nodes, (rows, nodes, hidden), and their logits,
            (rows, nodes, vocabulary).

        """
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
            depths: (1, positions), as for ``BlockCache.positions``; or one depth for all.
            visible: as ``block`` of ``BlockCache.mask``.

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
    """Proposes trees of one fixed shape."""

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
"""How many of the draft's best tokens a proposal is sampled from.

Speculative sampling is exact for any proposal distribution that the verifier's side knows. One over
the best tokens alone is much cheaper to warp, above all by ``top_p``, which sorts it, and its
proposals are accepted about as often.
"""


class DrawnChainDrafter(ShapeDrafter):
    """Proposes chains that are sampled from the draft's distribution over its best tokens."""

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
        del level  # a level of a chain has one node
        logits = logits[:, 0]
        best, tokens = logits.topk(min(CANDIDATES, logits.shape[1]))
        q = self.warp(best.float()).softmax(-1)
        self.probabilities.append(q.new_zeros(logits.shape).scatter(1, tokens, q))
        return tokens.gather(1, draw(q))


class DynamicDrafter(Drafter):
    """Grows trees towards the most probable tokens (EAGLE-2, arXiv:2406.16858, section 4).

    As in the reference (SafeAILab/EAGLE, eagle/model/cnets1.py, ``topK_genrate``): a node's score
    is the joint probability of the tokens up to it; the ``top_k`` best nodes of each level get
    ``top_k`` children each; the best nodes of all levels make up the tree.
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
        # The candidates, level by level. A parent is given by its index among them plus one; 0 is
        # the root.
        scores, tokens, parents = [score[:, 0]], [token[:, 0]], [torch.zeros_like(place)]
        frontier_score, frontier_token = scores[0], tokens[0]
        states, visible = state.expand(-1, k, -1), itself
        for depth in range(1, self.depth + 1):
            states, logits = self._extend(frontier_token, states, depth, visible)
            score, token = self._best(logits)  # (rows, k, k)
            scores.append((frontier_score[:, :, None] + score).flatten(1))
            tokens.append(token.flatten(1))
            parents.append(1 + place.repeat_interleave(k, 1))
            # The next frontier, and the parent of each of its nodes in this one.
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
        """Log-probabilities and tokens of each node's best children, both (rows, nodes, top_k)."""
        best = logits.topk(self.top_k)
        # As ``logsumexp`` does it, but the largest logit is already known.
        values = best.values.float()
        largest = values[..., :1]
        total = (logits - largest).exp_().sum(-1, keepdim=True)
        return values - largest - total.log_(), best.indices

    def _best_nodes(self, root: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor) -> Tree:
        """The tree of the best candidates, all (rows, candidates)."""
        # Stable, so that a parent precedes a child with the same score.
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
    """The drafter for a proposal method.

    Args:
        draft: the model.
        cache: an empty one.
        method: the type and sizes of proposals.
        warp: applied to the draft's logits if proposals are sampled.

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
                    f"The static tree has {len(EAGLE1_TREE)} tokens, not {size}; "
                    "leave the number of draft tokens out."
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
