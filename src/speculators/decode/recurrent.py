"""Drafting token by token with a draft that is fed its own output, as EAGLE drafts are.

Position t of the draft pairs token t+1 with the verifier's hidden state at token t, and its output
predicts token t+2 (EAGLE, arXiv:2401.15077, section 4.1). The draft projects the verifier's state
to its own width. Where the verifier has not run yet, the draft's output at the position before
takes the place of the projected state. Once the verifier has run there, the position is computed
again from the verifier's state, so the draft's cache never keeps what was computed from its own.

Drafted tokens are translated to the verifier's ids before they are embedded or enter a tree. The
best tokens are selected, and probabilities normalised, over the draft's vocabulary, which may be
smaller (EAGLE-3; SafeAILab/EAGLE, eagle/model/cnets.py, ``topK_genrate``).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from speculators.decode.cache import BlockCache
from speculators.decode.drafter import Draft, Drafter
from speculators.decode.drawing import draw_drafted
from speculators.decode.sampling import Warp
from speculators.decode.tree import Level, Path, Tree, ancestors_of, chain, shape_of
from speculators.errors import GenerationError

__all__ = [
    "DynamicTreeDrafter",
    "FixedTreeDrafter",
    "RecurrentDraft",
    "RecurrentDrafter",
    "SampledChainDrafter",
    "run_draft",
]


@runtime_checkable
class RecurrentDraft(Draft, Protocol):
    """A draft whose output at one position is its input at the next."""

    def project(self, verifier_states: Tensor, /) -> Tensor:
        """Turn the verifier's hidden states into inputs of ``draft``, each position by itself.

        Args:
            verifier_states: (rows, length, verifier width), of all ``verifier_layers``
                concatenated; in the verifier's dtype, on any device.

        Returns:
            (rows, length, draft width).

        """

    def draft(
        self,
        input_ids: Tensor,
        states: Tensor,
        /,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Any:
        """Run the draft, without its head.

        Args:
            input_ids: (rows, length), the verifier's token ids.
            states: (rows, length, draft width), projected, or earlier outputs.
            attention_mask: (rows, 1, length, past + length), to be added to the attention scores;
                causal if not given.
            position_ids: (rows, length).
            past_key_values: a cache of transformers.

        Returns:
            an object with ``last_hidden_state``, (rows, length, draft width), which is fed back and
            which ``logits`` takes.

        """


def run_draft(
    draft: RecurrentDraft,
    cache: BlockCache,
    tokens: Tensor,
    states: Tensor,
    depths: Tensor | int,
    visible: Tensor | None = None,
) -> Tensor:
    """Run a draft on new positions, and write them to its cache unconfirmed.

    Args:
        draft: the model.
        cache: its cache.
        tokens: (rows, positions), the verifier's ids.
        states: (rows, positions, draft width).
        depths: (1, positions), as for ``BlockCache.positions``; or one depth for all.
        visible: as ``block`` of ``BlockCache.mask``.

    Returns:
        its outputs, (rows, positions, draft width).

    """
    output: Tensor = draft.draft(
        tokens,
        states,
        attention_mask=cache.mask(tokens.shape[1], draft.dtype, draft.device, block=visible),
        position_ids=cache.positions(depths, draft.device).expand(-1, tokens.shape[1]),
        past_key_values=cache,
    ).last_hidden_state
    return output


class RecurrentDrafter(Drafter):
    """A drafter that feeds the draft's output back to it, level by level of the tree."""

    draft: RecurrentDraft

    def prefill(self, tokens: Tensor, states: Tensor) -> None:
        """See ``Drafter``."""
        self._run_confirmed(tokens, states, [tokens.shape[1]] * len(tokens))

    def propose(self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor) -> Tree:
        """See ``Drafter``."""
        output = self._run_confirmed(tokens, states, counts)
        ends = torch.as_tensor(counts, device=tokens.device)[:, None] - 1
        state = output.gather(1, ends[:, :, None].expand(-1, -1, output.shape[2]))
        tree = self._grow(tokens.gather(1, ends), state, self._logits(state))
        self.cache.unconfirmed = 0  # none of it was computed from the verifier's states
        return tree

    def _run_confirmed(
        self, tokens: Tensor, states: Tensor, counts: Sequence[int] | Tensor
    ) -> Tensor:
        """Run the draft on confirmed tokens, and keep them in its cache.

        The arguments are as for ``propose``.

        Returns:
            the draft's outputs, (rows, length, draft width).

        """
        depths = torch.arange(tokens.shape[1], device=tokens.device)[None]
        output = run_draft(self.draft, self.cache, tokens, self.draft.project(states), depths)
        self.cache.confirm(counts)
        return output

    @abstractmethod
    def _grow(self, root: Tensor, state: Tensor, logits: Tensor) -> Tree:
        """Propose what may follow each row's last token.

        Args:
            root: (rows, 1), the last tokens.
            state: (rows, 1, draft width), the draft's outputs at them.
            logits: (rows, 1, draft vocabulary), the logits of these outputs.

        """

    def _extend(
        self, tokens: Tensor, states: Tensor, depth: int, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the draft on nodes of one depth.

        Args:
            tokens: (rows, nodes), the verifier's ids.
            states: (rows, nodes, draft width), the draft's outputs at their parents.
            depth: of the nodes.
            visible: as for ``run_draft``.

        Returns:
            the draft's outputs at the nodes, (rows, nodes, draft width), and their logits,
            (rows, nodes, draft vocabulary).

        """
        states = run_draft(self.draft, self.cache, tokens, states, depth - 1, visible)
        self.cache.unconfirmed += tokens.shape[1]
        return states, self._logits(states)

    def _logits(self, states: Tensor) -> Tensor:
        return self.draft.logits(states).to(self.draft.device)


class FixedTreeDrafter(RecurrentDrafter):
    """Proposes trees of one fixed shape."""

    def __init__(self, draft: RecurrentDraft, cache: BlockCache, paths: tuple[Path, ...]) -> None:
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
        return self.shape.tree(torch.cat(tokens, 1))

    def _children(self, logits: Tensor, level: Level) -> Tensor:
        """The tokens of a level's nodes, by the verifier's ids.

        Args:
            logits: (rows, inner nodes above, draft vocabulary).
            level: the level.

        Returns:
            (rows, nodes).

        """
        if level.is_link:
            return self.draft.to_verifier(logits.argmax(-1))
        tokens = logits.topk(level.width).indices[:, level.parents, level.ranks]
        return self.draft.to_verifier(tokens)


class SampledChainDrafter(FixedTreeDrafter):
    """Proposes chains that are sampled from the draft's distribution over its best tokens."""

    warp: Warp

    def __init__(self, draft: RecurrentDraft, cache: BlockCache, length: int, warp: Warp) -> None:
        super().__init__(draft, cache, chain(length))
        self.warp = warp
        self.probabilities: list[Tensor] = []

    def _grow(self, root: Tensor, state: Tensor, logits: Tensor) -> Tree:
        self.probabilities = []
        tree = super()._grow(root, state, logits)
        return replace(tree, probabilities=torch.stack(self.probabilities, 1))

    def _children(self, logits: Tensor, level: Level) -> Tensor:
        del level  # a level of a chain has one node
        tokens, probabilities = draw_drafted(self.draft, self.warp, logits[:, 0])
        self.probabilities.append(probabilities)
        return tokens


class DynamicTreeDrafter(RecurrentDrafter):
    """Grows trees towards the most probable tokens (EAGLE-2, arXiv:2406.16858, section 4).

    As in the reference (SafeAILab/EAGLE, eagle/model/cnets1.py, ``topK_genrate``): a node's score
    is the joint probability of the tokens up to it; the ``top_k`` best nodes of each level get
    ``top_k`` children each; the best nodes of all levels make up the tree.
    """

    def __init__(
        self, draft: RecurrentDraft, cache: BlockCache, nodes: int, depth: int, top_k: int
    ) -> None:
        reach = 2 + depth + max(nodes, depth * top_k)
        super().__init__(draft, cache, deepest=1 + depth, reach=reach)
        self.nodes, self.depth, self.top_k = nodes, depth, top_k

    def _grow(self, root: Tensor, state: Tensor, logits: Tensor) -> Tree:
        rows, k = len(root), self.top_k
        if k > logits.shape[2]:
            raise GenerationError(
                f"tree_top_k {k} is more than the {logits.shape[2]} tokens of the draft's "
                "vocabulary; choose a smaller one."
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
            states, score, token = self._expand(frontier_token, states, depth, visible, scores)
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

    def _expand(
        self,
        tokens: Tensor,
        states: Tensor,
        depth: int,
        visible: Tensor | None,
        scores: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the draft on the best nodes of a level.

        Args:
            tokens: as for ``_extend``, like the next three.
            states: likewise.
            depth: likewise.
            visible: likewise.
            scores: of all candidates of this level and those above, (rows, candidates) by level;
                the nodes are the ``top_k`` best of this level, the best one first.

        Returns:
            the draft's outputs at the nodes, and the result of ``_best``.

        """
        del scores  # for a drafter that leaves out what cannot become part of the tree
        states, logits = self._extend(tokens, states, depth, visible)
        return states, *self._best(logits)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens of each node's best children, both (rows, nodes, top_k).

        Tokens are given by the verifier's ids.
        """
        best = logits.topk(self.top_k)
        # As ``logsumexp`` does it, but the largest logit is already known.
        values = best.values.float()
        largest = values[..., :1]
        total = (logits - largest).exp_().sum(-1, keepdim=True)
        return values - largest - total.log_(), self.draft.to_verifier(best.indices)

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
