"""Running the verifier on a tree of proposed tokens, and following the tree while it agrees."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speculators.decode.cache import BlockCache
from speculators.decode.capture import StateCapture
from speculators.decode.linear import LINEAR_ATTENTION, LinearStates, linear_layers
from speculators.decode.tree import Tree
from speculators.errors import GenerationError

__all__ = ["MASKABLE", "VerifierPass", "children_of", "depth_of", "padded", "walk"]

MASKABLE = ("sdpa", "eager")
"""Attention implementations that take a 4D mask."""

NO_TOKEN = -1
"""No token has this id."""


class VerifierPass:
    """Forward passes of the verifier that also return its hidden states; a context manager.

    Hidden states are those of ``layers``, concatenated: their width, called the verifier width, is
    the hidden size times the number of layers.

    Args:
        model: a causal language model.
        cache: an empty one.
        max_length: the greatest number of tokens that a sequence may have.
        layers: which hidden states to return, as for ``Draft.verifier_layers``.

    Attributes:
        states: (rows, nodes, verifier width), the hidden states of the last verified tree.

    Raises:
        GenerationError: if the model does not support speculative decoding, or does not have the
            layers.

    """

    states: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        cache: BlockCache,
        max_length: int,
        layers: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.cache = cache
        self.windows = windows_of(model)
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        self.last_position = max(known, max_length) - 1
        takes = inspect.signature(type(model).forward).parameters
        self.only_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # transformers calls it past_key_values until 5.23, and cache from 5.24 on.
        self.cache_argument = "cache" if "cache" in takes else "past_key_values"
        # The device of the prompts, set by ``prefill``: later tokens go there too, wherever the
        # layers of a model are that is spread over several devices.
        self._device = model.device
        self._capture = StateCapture(model, layers)
        self._linear = LinearStates(model, cache)
        self._hooks = ExitStack()

    def __enter__(self) -> "VerifierPass":
        self._hooks.enter_context(self._capture)
        self._hooks.enter_context(self._linear)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def prefill(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run on the prompts, (rows, length), padded at the left.

        Returns:
            the logits after the last tokens, (rows, vocabulary), and the hidden states at all
            tokens, (rows, length, verifier width).

        """
        self._device = tokens.device
        logits, states = self._run(tokens, attention_mask, position_ids, **self.only_last)
        self.cache.confirm([tokens.shape[1]] * len(tokens))
        return logits[:, -1], states

    def prefill_recorded(self, tokens: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Run on prompts as ``prefill`` does, without waiting for the device.

        The cache must be recording.

        Args:
            tokens: (rows, length), padded at the left, and all from the same place on at the right.
            last: (1), the place of the prompts' last tokens.

        Returns:
            as for ``prefill``.

        """
        self._device = tokens.device
        depths = torch.arange(tokens.shape[1], device=tokens.device)[None]
        positions = self.cache.positions(depths, tokens.device).clamp(0, self.last_position)
        only_last = dict.fromkeys(self.only_last, last)
        logits, states = self._run(tokens, self._masks(None, depths), positions, **only_last)
        return logits[:, -1] if only_last else logits[:, last].squeeze(1), states

    def verify(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """Run on a tree, and write its nodes to the cache unconfirmed.

        Returns:
            the logits, (rows, nodes, vocabulary), and the result of ``packed_for_host``.

        """
        device = self._device
        depths = tree.depths.to(device)
        logits, self.states = self._run(
            tree.tokens.to(device),
            self._masks(None if tree.is_chain else tree.ancestors.to(device), depths),
            # A proposal may reach past the maximum length. Those nodes are never kept, but must
            # have a position that the model knows.
            self.cache.positions(depths, device).clamp(max=self.last_position),
        )
        return logits, packed_for_host(tree, logits)

    def keep(self, tree: Tree, paths: Sequence[Sequence[int]]) -> Tensor:
        """Confirm nodes of the last verified tree, and discard the others.

        Args:
            tree: that tree.
            paths: by row, the nodes of a path from the root.

        Returns:
            the hidden states at the nodes, (rows, length of the longest path, verifier width).

        """
        if tree.is_chain:
            states = self.states[:, : max(map(len, paths))]
        else:
            states = self.gather(self.states, padded(paths, self.states.device))
        counts = [len(path) for path in paths]
        self.cache.confirm(counts)
        self._linear.keep(counts)
        return states

    def gather(self, states: Tensor, nodes: Tensor) -> Tensor:
        """Move nodes of the last verified tree to the front of its block in the cache.

        Args:
            states: (rows, all nodes, verifier width).
            nodes: (rows, nodes), in their new order.

        Returns:
            the hidden states at them, (rows, nodes, verifier width).

        """
        self.cache.gather(nodes)
        return states.gather(1, nodes[:, :, None].expand(-1, -1, states.shape[2]))

    def _run(
        self, tokens: Tensor, mask: Any, position_ids: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_argument: self.cache},
            **settings,
        ).logits
        return logits, self._capture.take()

    def _masks(self, block: Tensor | None, depths: Tensor) -> Any:
        """The mask of all layers, or one for each type of layer; ``None`` if none is needed."""
        masks = {
            layer_type: self.cache.mask(
                depths.shape[1],
                self.model.dtype,
                depths.device,
                block=block,
                window=window,
                depths=depths,
            )
            for layer_type, window in self.windows.items()
        }
        if None in masks.values():
            return None
        implementation = self.model.config._attn_implementation
        if implementation not in MASKABLE:
            raise GenerationError(
                f"Trees and padded batches need attention masks, which the attention "
                f"implementation {implementation!r} does not take; load the verifier with "
                f"attn_implementation={MASKABLE[0]!r}."
            )
        return masks.get(None, masks)


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether a model keeps a state that cannot be rolled back, as Mamba's layers do."""
    return bool(getattr(model, "_is_stateful", False)) and not linear_layers(model)


def windows_of(model: PreTrainedModel) -> dict[str | None, int | None]:
    """The attention window of a verifier's layers, by the type of the layers.

    The key ``None`` stands for a single mask for all layers, the value ``None`` for no window.

    Raises:
        GenerationError: if the model keeps a state other than keys and values, takes no
            position_ids, or has layers of an unknown type: its output might not be reproduced
            exactly.

    """
    name = type(model).__name__
    if is_stateful(model):
        raise GenerationError(
            f"Speculative decoding does not support {name}: its state cannot be rolled back when "
            "drafted tokens are rejected."
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise GenerationError(
            f"Speculative decoding does not support {name}: its forward takes no position_ids."
        )
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if linear_layers(model):
        types.discard(LINEAR_ATTENTION)  # no token of a block is hidden from it
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(types - windows.keys()):
        raise GenerationError(
            f"Speculative decoding does not support {name}: it has layers of type {unknown[0]!r}, "
            "which is not known to be exact."
        )
    if len({windows[one] for one in types}) > 1:
        return {one: windows[one] for one in sorted(types)}
    return {None: windows[types.pop()] if types else window}


def packed_for_host(tree: Tree, logits: Tensor) -> Tensor:
    """All that the host reads in a step, in one tensor so that it waits for the device only once.

    Returns:
        (3, rows, nodes): the tokens of the tree, their parents, and the verifier's best tokens
        after them.

    """
    best = logits.argmax(-1).to(tree.tokens.device)
    return torch.stack((tree.tokens, tree.parents.expand_as(tree.tokens), best))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, (rows, longest), padded with zeros at the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def children_of(tokens: Sequence[int], parents: Sequence[int]) -> list[dict[int, int]]:
    """The children of each node, by their tokens."""
    children: list[dict[int, int]] = [{} for _ in tokens]
    for node in range(1, len(tokens)):
        children[parents[node]][tokens[node]] = node
    return children


def depth_of(parents: Sequence[int]) -> int:
    """The number of levels that a tree has below its root."""
    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        depths[node] = 1 + depths[parents[node]]
    return max(depths)


def known_choice(tokens: Iterable[int]) -> Callable[[int], int]:
    """The ``choose`` of ``walk`` where the verifier's tokens are known, in their order.

    After the last one comes a token that is never drafted.
    """
    following = chain(tokens, repeat(NO_TOKEN))
    return lambda _node: next(following)


def walk(
    children: Sequence[dict[int, int]], choose: Callable[[int], int]
) -> tuple[list[int], list[int]]:
    """Follow a tree from its root as long as the verifier's token is among the children.

    Args:
        children: see ``children_of``.
        choose: the verifier's token after a node; called once for each node on the path, in order.

    Returns:
        the nodes on the path, the root included, and the verifier's token after each of them:
        all but the last one are drafted tokens that were accepted.

    """
    path, tokens = [0], [choose(0)]
    while (node := children[path[-1]].get(tokens[-1])) is not None:
        path.append(node)
        tokens.append(choose(node))
    return path, tokens
