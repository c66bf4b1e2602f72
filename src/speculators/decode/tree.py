"""Trees of drafted tokens. A chain is a tree of width one."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["EAGLE1_TREE", "Level", "Shape", "Tree", "ancestors_of", "chain", "shape_of"]

Path = tuple[int, ...]
"""Where a node is: the rank of each token on the path to it among its siblings, 0 for the best."""

# fmt: off
EAGLE1_TREE: tuple[Path, ...] = (
    (0,), (1,), (2,), (3,),
    (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
    (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
)
# fmt: on
"""The tree of EAGLE-1 (SafeAILab/EAGLE, eagle/model/choices.py, ``mc_sim_7b_63``)."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Drafted tokens after the last confirmed one, which is the root.

    Parents come before their children. Where all rows have the same shape, the tensors that
    describe it have a single row.

    Attributes:
        tokens: (rows, nodes), the verifier's ids.
        parents: (rows or 1, nodes), the index of each node's parent; the root is its own parent.
        depths: (rows or 1, nodes), 0 for the root.
        ancestors: (rows or 1, nodes, nodes), whether the second node is on the path from the root
            to the first one, both included.
        is_chain: whether each node is the only child of the one before it.
        probabilities: (rows, nodes - 1, verifier vocabulary), for sampled chains: the distribution
            that the child of each node but the last was sampled from; ``None`` where the draft's
            best tokens were taken.

    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    is_chain: bool = False
    probabilities: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth, as drafted from the inner nodes (those with children) above.

    Attributes:
        parents: (nodes), the index of each node's parent among the inner nodes of the level above.
        ranks: (nodes), the rank of each node among its parent's best tokens.
        width: the number of ranks.
        inner: (inner nodes), the indices of this level's nodes that have children.
        visible: (1, inner nodes, inner nodes of this level and all above but the root), whether
            the second is on the path to the first; ``None`` if all are.
        is_link: whether the level is a single node, the best child of the one inner node above.

    """

    parents: Tensor
    ranks: Tensor
    width: int
    inner: Tensor
    visible: Tensor | None
    is_link: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree that is the same in every step; attributes of the same name are as in ``Tree``."""

    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    is_chain: bool
    levels: tuple[Level, ...]

    def tree(self, tokens: Tensor, probabilities: Tensor | None = None) -> Tree:
        """The tree of this shape with these tokens; both arguments are as in ``Tree``."""
        return Tree(
            tokens=tokens,
            parents=self.parents,
            depths=self.depths,
            ancestors=self.ancestors,
            is_chain=self.is_chain,
            probabilities=probabilities,
        )


def chain(length: int) -> tuple[Path, ...]:
    """The paths of a chain."""
    return tuple((0,) * depth for depth in range(1, length + 1))


@cache  # never evicted, since graphs that were recorded with a shape need its tensors
def shape_of(paths: tuple[Path, ...], device: torch.device) -> Shape:
    """The shape with a node at each path; all prefixes of a path must be among the paths."""
    nodes: list[Path] = [(), *sorted(paths, key=lambda path: (len(path), path))]
    place = {path: index for index, path in enumerate(nodes)}
    parents = torch.tensor([place[path[:-1]] for path in nodes], device=device)
    ancestors = ancestors_of(parents[None])
    inner = sorted({place[path[:-1]] for path in nodes[1:]})

    def level(depth: int) -> Level:
        here = [place[path] for path in nodes if len(path) == depth]
        above = [node for node in inner if len(nodes[node]) == depth - 1]
        with_children = [node for node in inner if node in here]
        so_far = [node for node in inner if 0 < node <= here[-1]]
        ranks = [nodes[node][-1] for node in here]
        visible = ancestors[:, with_children][:, :, so_far]
        return Level(
            parents=torch.tensor([above.index(place[nodes[n][:-1]]) for n in here], device=device),
            ranks=torch.tensor(ranks, device=device),
            width=1 + max(ranks),
            inner=torch.tensor([here.index(node) for node in with_children], device=device),
            visible=None if visible.all() else visible,
            is_link=ranks == [0] and len(above) == 1,
        )

    return Shape(
        parents=parents[None],
        depths=torch.tensor([[len(path) for path in nodes]], device=device),
        ancestors=ancestors,
        is_chain=len(inner) == len(nodes) - 1,
        levels=tuple(level(depth) for depth in range(1, 1 + max(map(len, nodes)))),
    )


def ancestors_of(parents: Tensor) -> Tensor:
    """``Tree.ancestors`` from ``Tree.parents``, (rows, nodes) → (rows, nodes, nodes).

    By doubling: in round i each node knows the last 2^i nodes on the path to it, itself included,
    and adds those known to the node before them.
    """
    nodes = parents.shape[1]
    ancestors = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(len(parents), 1, 1)
    farthest = parents
    for _ in range(max(1, (nodes - 1).bit_length())):
        ancestors = ancestors | ancestors.gather(1, farthest[:, :, None].expand(-1, -1, nodes))
        farthest = farthest.gather(1, farthest)
    return ancestors
