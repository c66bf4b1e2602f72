"""Writing text with the verifier, many texts at a time, and keeping its hidden states."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer


def grouped_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention that treats the query heads of a key head as further query rows.

    So keys and values, nearly all that decoding a large batch reads, are never repeated.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    attended = F.scaled_dot_product_attention(
        query.reshape(query.shape[0], kv_heads, -1, query.shape[-1]),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, heads // kv_heads, 1),
        scale=scaling,
    )
    return attended.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)


class Room(DynamicLayer):
    """A cache layer in memory that is allocated once, so that no step copies it."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self.length = room, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _length, size = key_states.shape
            self.keys = key_states.new_empty(batch, heads, self.room, size)
            self.values = torch.empty_like(self.keys)
        rows = slice(self.length, self.length + key_states.shape[2])
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        keys[:, :, rows], values[:, :, rows] = key_states, value_states
        self.length = rows.stop
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """The number of tokens that it holds."""
        return self.length


Choose = Callable[[Tensor, int, Tensor], Tensor]
"""(indices of rows, column of the last token, states (rows, hidden)) → next tokens, (rows,)."""

Keep = Callable[[Tensor], Tensor]
"""The last hidden states of a pass, (..., hidden) → the states of that pass that are kept."""

LAST = -1
"""The number of the state after the verifier's final norm; state i is what enters its layer i."""


class Keeper:
    """Keeps some of the states of each pass of a model, concatenated.

    Args:
        writer: the model.
        layers: the numbers of the states.

    """

    def __init__(self, writer: Any, layers: tuple[int, ...]) -> None:
        self.layers, self.seen = layers, dict[int, Tensor]()
        for layer in set(layers) - {LAST}:

            def note(_module: nn.Module, arguments: Any, layer: int = layer) -> None:
                self.seen[layer] = arguments[0]

            writer.model.layers[layer].register_forward_pre_hook(note)

    def __call__(self, last: Tensor) -> Tensor:
        """The states of the last pass, (..., len(layers) * hidden), of which one is ``last``."""
        self.seen[LAST] = last
        return torch.cat([self.seen[layer] for layer in self.layers], -1)


@torch.inference_mode()
def write(
    writer: Any, prompts: list[list[int]], most: int, end: int, choose: Choose, keep: Keep
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue prompts until ``end``, by ``most`` tokens at most.

    Returns:
        the ids, padded at the left and filled up with ``end`` after the end of a text; the columns
        where prompts begin, (prompts,); and the states, where that of a last token may be missing.

    """
    device, width = writer.device, max(map(len, prompts))
    length = width + most
    ids = torch.full((len(prompts), length), end)
    ids[:, :width] = torch.tensor([[end] * (width - len(row)) + row for row in prompts])
    ids = ids.to(device)
    starts = torch.tensor([width - len(row) for row in prompts]).to(device)
    columns = torch.arange(length, device=device)
    positions = (columns - starts[:, None]).clamp(min=0)
    unseen = (columns < starts[:, None])[:, None, None]
    mask = torch.zeros(unseen.shape, dtype=writer.dtype, device=device)
    mask.masked_fill_(unseen, -math.inf)
    # Padding before a prompt attends to itself, since a fully masked row would give NaN.
    ahead = columns[:width] > columns[:width, None]
    itself = torch.eye(width, dtype=torch.bool, device=device)
    hidden_from = (ahead | unseen[..., :width]) & ~itself
    prompt_mask = torch.zeros(hidden_from.shape, dtype=writer.dtype, device=device)
    prompt_mask.masked_fill_(hidden_from, -math.inf)

    cache = Cache(layers=[Room(length) for _ in range(writer.config.num_hidden_layers)])
    thought = writer.model(
        ids[:, :width],
        attention_mask=prompt_mask,
        position_ids=positions[:, :width],
        past_key_values=cache,
    ).last_hidden_state
    kept = keep(thought)
    states = kept.new_zeros(len(prompts), length, kept.shape[-1])
    states[:, :width], thought = kept, thought[:, -1].clone()
    del kept
    del prompt_mask, hidden_from
    rows = torch.arange(len(prompts), device=device)
    over = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for column in range(width, length):
        token = choose(rows, column - 1, thought).masked_fill(over, end)
        ids[rows, column] = token
        over |= token == end
        if column + 1 == length:
            break
        if (column - width) % 16 == 15:  # only now and then, since it waits for the GPU
            going_on = (~over).nonzero().flatten()
            if not len(going_on):
                break
            if len(going_on) < 0.85 * len(rows):
                cache.batch_select_indices(going_on)
                rows, over, token = rows[going_on], over[going_on], token[going_on]
                mask, positions = mask[going_on], positions[going_on]
        thought = writer.model(
            token[:, None],
            attention_mask=mask[..., : column + 1],
            position_ids=positions[:, column, None],
            past_key_values=cache,
        ).last_hidden_state
        states[rows, column] = keep(thought)[:, 0]
        thought = thought[:, 0]
    return ids, starts, states
