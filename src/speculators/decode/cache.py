"""The key-value cache of speculation, written in place and rolled back without copying.

A verifier or draft runs on a *block* of positions, of which only some will be confirmed. The block
is written after the confirmed slots of each row; slots that are not confirmed are overwritten by
the next block. Rows of a batch may have different numbers of confirmed positions. The memory
doubles when it is full, so a position is copied at most twice on average. Layers of linear
attention have no slots; ``linear.py`` takes their states back.

While a step is recorded as a CUDA graph, tensors hold the numbers of confirmed slots and of slots
with padding, and a mask covers all slots up to a limit, so that nothing recorded depends on values
on the host. There may be room for more rows than are in use.
"""

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

__all__ = ["BlockCache"]

MARGIN = 128
"""The least number of spare slots after a cache is enlarged."""


class BlockCache(Cache):
    """The keys and values of all layers of a model.

    Args:
        padding: by row, the number of slots at the left that hold padding.
        linear: the numbers of the layers that are of linear attention.

    Attributes:
        lengths: by row, the number of confirmed slots, padding included.
        unconfirmed: the number of slots after them that hold unconfirmed positions.
        min_slots: the least number of slots that each layer makes room for.
        written: the length of the block that was written last.

    """

    def __init__(self, padding: Sequence[int], linear: Collection[int] = ()) -> None:
        # A layer does not keep its cache alive, so memory is freed as soon as the cache is dropped.
        proxy = weakref.proxy(self)
        super().__init__(layer_class_to_replicate=lambda: BlockLayer(proxy))  # type: ignore[arg-type]
        self.layers = [
            LinearAttentionLayer() if number in linear else BlockLayer(proxy)
            for number in range(1 + max(linear, default=-1))
        ]
        self.padding = list(padding)
        self.lengths = [0] * len(self.padding)
        self.unconfirmed = 0
        self.min_slots = 0
        self.written = 0
        self._slots: dict[tuple[int, int, torch.device], Tensor] = {}
        self._recorded: Tensor | None = None
        self._recorded_padding: Tensor | None = None
        self._limit = 0

    def restart(self, padding: Sequence[int]) -> None:
        """Forget all positions, and keep the memory for other prompts."""
        self.padding = list(padding)
        self.lengths = [0] * len(self.padding)
        self.unconfirmed = self.min_slots = 0
        self._slots.clear()

    @property
    def is_aligned(self) -> bool:
        """Whether the next block is known to start at the same slot in every row."""
        return self._recorded is None and min(self.lengths) == max(self.lengths)

    @property
    def is_dense(self) -> bool:
        """Whether slots equal positions, so that the next block needs only a causal mask."""
        return self.is_aligned and not any(self.padding)

    @property
    def start(self) -> int:
        """The first slot of the next block, in the longest row."""
        return max(self.lengths) + self.unconfirmed

    def end(self, length: int) -> int:
        """The end of the slots that a block of this length attends to, in the longest row."""
        return self.start + length if self._recorded is None else self._limit

    def starts(self, device: torch.device) -> Tensor:
        """(rows, 1): the first unconfirmed slot."""
        if self._recorded is not None:
            return self._recorded[:, None]
        return torch.tensor(self.lengths, device=device)[:, None]

    def padded_at(self, device: torch.device) -> Tensor | None:
        """(rows, 1): the number of slots with padding; ``None`` if there are none in any row."""
        if self._recorded is not None:
            return None if self._recorded_padding is None else self._recorded_padding[:, None]
        if not any(self.padding):
            return None
        return torch.tensor(self.padding, device=device)[:, None]

    def reserve(self, slots: int, rows: int) -> bool:
        """Make room for this many slots in each row, and for this many rows.

        They must cover what is confirmed. If there is no room, there is none for more afterwards,
        but for what was reserved since ``restart``: long prompts and many of them do not add up.

        Returns:
            whether keys and values had to be moved.

        """
        self.min_slots = max(self.min_slots, slots)
        moved = [layer.reserve(self.min_slots, rows) for layer in self._blocks]
        return any(moved)

    @contextmanager
    def recording(self, lengths: Tensor, padding: Tensor | None, limit: int) -> Iterator[None]:
        """Take the state of each row from tensors; blocks attend to all slots up to a limit.

        Args:
            lengths: (rows), used in place of the attribute ``lengths``, which does not change.
            padding: (rows), likewise; ``None`` if no row has any.
            limit: no block may end after this many slots; there must be room for them.

        """
        self._recorded, self._recorded_padding, self._limit = lengths, padding, limit
        self._slots.clear()
        try:
            yield
        finally:
            self._recorded, self._recorded_padding, self.unconfirmed = None, None, 0
            self._slots.clear()

    def next_slots(self, length: int, device: torch.device) -> Tensor:
        """(rows, length): the slots of the next block, computed once for all layers."""
        key = (length, self.unconfirmed, device)
        if key not in self._slots:
            offsets = torch.arange(self.unconfirmed, self.unconfirmed + length, device=device)
            self._slots[key] = self.starts(device) + offsets
        return self._slots[key]

    def positions(self, depths: Tensor | int, device: torch.device) -> Tensor:
        """The positions of nodes at these depths, (rows or 1, nodes) → (rows, nodes).

        A single depth gives (rows, 1). Depth 0 is the first unconfirmed position.
        """
        padded = self.padded_at(device)
        starts = self.starts(device)
        return (starts if padded is None else starts - padded) + depths

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
        """The mask of the next block, to be added to its attention scores.

        Args:
            queries: the length of the block.
            dtype: of the mask.
            device: of the mask.
            block: (rows or 1, queries, nodes), whether a query attends to an unconfirmed node; the
                nodes are those unconfirmed so far and the block's own. If not given, the mask is
                causal.
            window: the number of positions that a query attends to, itself included; all if not
                given.
            depths: (rows or 1, nodes), needed with ``window``: the depth of each node, as for
                ``positions``. ``unconfirmed`` must then be 0.

        Returns:
            (rows, 1, queries, slots), zero or the lowest number of the dtype; ``None`` if the mask
            that transformers makes by itself is the same.

        """
        if block is None and self.is_dense:
            return None
        starts, padded = self.starts(device), self.padded_at(device)
        rows, nodes = len(starts), self.unconfirmed + queries
        slots = torch.arange(self.end(queries), device=device)
        at = starts + slots[:nodes]
        if block is None:
            hidden = slots > at[:, self.unconfirmed :, None]
        else:
            hidden = (slots >= starts)[:, None].repeat(1, queries, 1)
            places = at[:, None].expand(-1, queries, -1)
            hidden.scatter_(2, places, ~block.expand(rows, -1, -1))
        if padded is not None:
            hidden = hidden | (slots < padded)[:, None]
        if window is not None:
            assert depths is not None
            positions = (starts + depths).expand(rows, -1)
            slot_positions = slots.repeat(rows, 1).scatter_(1, at, positions)
            hidden = hidden | (positions[:, :, None] - slot_positions[:, None] >= window)
        return (hidden.to(dtype) * torch.finfo(dtype).min)[:, None]

    def confirm(self, counts: Sequence[int] | Tensor) -> None:
        """Confirm the first slots of the block in each row, and discard the others.

        Args:
            counts: by row, the number of slots to confirm; while a step is recorded, a tensor, or
                the same number for all rows.

        """
        if self._recorded is not None:
            self._recorded = self._recorded + (counts if isinstance(counts, Tensor) else counts[0])
        else:
            self.lengths = [length + int(n) for length, n in zip(self.lengths, counts, strict=True)]
        self.unconfirmed = 0
        self._slots.clear()

    def gather(self, paths: Tensor) -> None:
        """Move scattered nodes of the block to its front, so that they can be confirmed.

        Args:
            paths: (rows, nodes), the indices of the nodes in the block, in their new order.

        """
        starts = self.starts(paths.device)
        to = starts + torch.arange(paths.shape[1], device=paths.device)
        for layer in self._blocks:
            layer.move(starts + paths, to)

    @staticmethod
    def write(
        keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, at: Tensor
    ) -> None:
        """Write to one layer of a cache.

        Args:
            keys: (rows, heads, slots, head size), of the cache.
            values: likewise.
            new_keys: (rows, heads, length, head size).
            new_values: likewise.
            at: (rows, length), the slots to write to.

        """
        keys.scatter_(2, _places(at, new_keys), new_keys)
        values.scatter_(2, _places(at, new_values), new_values)

    def select(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.padding = [self.padding[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self._slots.clear()
        for layer in self.layers:
            if isinstance(layer, BlockLayer):
                layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))
            else:
                layer.reorder_cache(torch.tensor(rows))  # type: ignore[arg-type]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """The first slot of the next block, the same in all layers."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """The number of slots that a block of this length attends to, and the first of them."""
        return self.start + query_length, 0

    @property
    def _blocks(self) -> list["BlockLayer"]:
        """The layers that have slots."""
        return [layer for layer in self.layers if isinstance(layer, BlockLayer)]


class BlockLayer(CacheLayerMixin):
    """One layer's keys and values, each (rows, heads, slots, head size)."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: BlockCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with no slots."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write a block, and return the keys and values of all slots up to its end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cache.written = length = key_states.shape[2]
        end = self.cache.end(length)
        if end > self.keys.shape[2]:
            slots = max(end + MARGIN, 2 * self.keys.shape[2], self.cache.min_slots)
            self.reserve(slots, len(key_states))
        keys, values = (states[: len(key_states), :, :end] for states in (self.keys, self.values))
        if self.cache.is_aligned:
            keys[:, :, end - length :] = key_states
            values[:, :, end - length :] = value_states
        else:
            at = self.cache.next_slots(length, keys.device)
            self.cache.write(keys, values, key_states, value_states, at)
        return keys, values

    def reserve(self, slots: int, rows: int) -> bool:
        """As for the whole cache."""
        if slots <= self.keys.shape[2] and rows <= len(self.keys):
            return False
        self.keys = _enlarged(self.keys, rows, slots)
        self.values = _enlarged(self.values, rows, slots)
        return True

    def move(self, source: Tensor, to: Tensor) -> None:
        """Copy the slots ``source``, (rows, slots), to the slots ``to``."""
        for states in (self.keys, self.values):
            moved = states.gather(2, _places(source.to(states.device), states))
            states.scatter_(2, _places(to.to(states.device), states), moved)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Drop all rows but these, in place, since graphs may have been recorded over them."""
        used = self.cache.start
        for states in (self.keys, self.values):
            states[: len(indices), :, :used] = states[indices, :, :used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of slots that a block of this length attends to, and the first of them."""
        return self.cache.start + query_length, 0

    def get_seq_length(self) -> int:
        """The first slot of the next block."""
        return self.cache.start

    def get_max_length(self) -> int:
        """-1, which stands for no maximum in transformers."""
        return -1


def _enlarged(states: Tensor, rows: int, slots: int) -> Tensor:
    """The states in memory for this many rows and slots.

    New slots are zero, since even masked values must be finite.
    """
    kept = states[:rows, :, :slots]
    larger = states.new_zeros(rows, states.shape[1], slots, states.shape[3])
    larger[: len(kept), :, : kept.shape[2]] = kept
    return larger


def _places(slots: Tensor, states: Tensor) -> Tensor:
    """Slots, (rows, slots), as an index into ``states``, (rows, heads, slots, head size)."""
    return slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
