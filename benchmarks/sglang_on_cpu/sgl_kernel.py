"""Plain PyTorch in place of the kernels of SGLang's CPU engine; PyPI has those for GPUs only.

Only what Llama models and EAGLE, EAGLE-3 and DFlash drafts take. Every other kernel can be
imported, and says its name if it is called. ``b`` is a request, ``n`` the tokens of a tree with its
root, and pools are addressed by slots, one for each token.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__version__ = "0.4.5"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A kernel that can be imported, but not called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(name)

    return missing


# Slots of tokens


def _ranges(rows: Tensor, start: Tensor, end: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """The row of each request, its positions, and where they lie with all requests in one row."""
    at = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        yield row, slice(first, last), slice(at, at + last - first)
        at += last - first


def assign_req_to_token_pool_cpu(
    rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, _: int
) -> None:
    """Write the slots of new positions into the table, (rows, positions)."""
    for row, positions, among in _ranges(rows, start, end):
        req_to_token[row, positions] = slots[among].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, _: int
) -> None:
    """Read the slots of positions from the table."""
    for row, positions, among in _ranges(rows, start, end):
        slots[among] = req_to_token[row, positions].to(slots.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    pool_len: int,
    topk: int,
    steps: int,
) -> None:
    """Read the slots of the positions that are drafted, those of a branch together."""
    end = seq_lens + topk * steps
    assign_extend_cache_locs_cpu(rows, req_to_token, seq_lens, end, slots, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, topk: int, steps: int, pool_len: int
) -> Tensor:
    """A table with a row for each branch: the prefix, and the branch's own slots."""
    made = torch.zeros(len(rows) * topk, pool_len, dtype=req_to_token.dtype)
    for b, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        for branch in range(topk):
            own = length + branch * steps
            new = made[b * topk + branch]
            new[:length] = req_to_token[row, :length]
            new[length : length + steps] = req_to_token[row, own : own + steps]
    return made


def copy_all_layer_kv_cache_cpu(pools: Tensor, strides: Tensor, to: Tensor, of: Tensor) -> None:
    """Copy slots to others in every pool; pools are addresses, strides bytes of a slot."""
    for pool, size in zip(pools.tolist(), strides.tolist(), strict=True):
        held = [ctypes.string_at(pool + slot * size, size) for slot in of.tolist()]
        for slot, content in zip(to.tolist(), held, strict=True):
            ctypes.memmove(pool + slot * size, content, size)


# Trees


def build_tree_kernel_efficient_cpu(
    parents: Tensor,
    selected: Tensor,
    seq_lens: Tensor,
    mask: Tensor,
    positions: Tensor,
    index: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    topk: int,
    _: int,
    n: int,
    mode: int,
) -> None:
    """Link the selected candidates of each request to a tree, in place.

    ``parents``, (b, groups), says which candidate each group of ``topk`` candidates continues; the
    first group continues the root. ``selected``, (b, n - 1), is in ascending order. The mask,
    b * n * n, is True where a token sees another one. The links, (b, n), are -1 where there is
    none. ``mode`` 1 is a mask without the prefix.

    """
    assert int(mode) == 1, mode
    for b, length in enumerate(seq_lens.tolist()):
        chosen, continued = selected[b].tolist(), parents[b].tolist()
        groups = [candidate // topk for candidate in chosen]
        parent = [0] + [chosen.index(continued[it]) + 1 if it else 0 for it in groups]
        sees = mask.view(-1, n, n)[b]
        sees[:] = False
        index[b] = torch.arange(b * n, (b + 1) * n)
        for token in range(n):
            path = [token]
            while path[-1]:
                path.append(parent[path[-1]])
            sees[token, path] = True
            positions.view(-1, n)[b, token] = length + len(path) - 1
        for token in range(n - 1, 0, -1):
            next_sibling[b, token] = next_token[b, parent[token]]
            next_token[b, parent[token]] = token


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Follow the verifier's best tokens from the root, as far as the tree has them, in place."""
    for b, (tokens, best) in enumerate(zip(candidates, target_predict, strict=True)):
        at, accepted = 0, 0
        accept_index[b, 0] = retrive_index[b, 0]
        for _ in range(accept_index.shape[1] - 1):
            child = int(retrive_next_token[b, at])
            while child != -1 and tokens[child] != best[at]:
                child = int(retrive_next_sibling[b, child])
            if child == -1:
                break
            predicts[retrive_index[b, at]] = best[at]
            accepted += 1
            accept_index[b, accepted] = retrive_index[b, child]
            at = child
        predicts[retrive_index[b, at]] = best[at]
        accept_token_num[b] = accepted


def fill_bonus_tokens_cpu(tokens: Tensor, lengths: Tensor, bonus: Tensor, stride: int) -> None:
    """The last token of each request, the verifier's own."""
    bonus.copy_(tokens.view(-1, stride)[torch.arange(len(bonus)), lengths.long() - 1])


def fill_accept_out_cache_loc_cpu(
    accept_index: Tensor, slots: Tensor, accepted: Tensor, *_: object
) -> None:
    """The slots of the accepted tokens."""
    taken = accept_index.flatten()
    taken = taken[taken > -1].long()
    accepted.view(-1)[: len(taken)] = slots[taken]


# Attention


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Attention of (new, heads, dim) to (all, key-value heads, dim)."""
    q, k, v = (it.transpose(0, 1)[None] for it in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    slots: Tensor,
    _: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    scaling: float,
    *__: Any,
) -> None:
    """One new token for each request, whose key and value are stored first."""
    if k is not None and v is not None:
        keys[slots] = k.view(-1, *keys.shape[1:]).to(keys.dtype)
        values[slots] = v.view(-1, *values.shape[1:]).to(values.dtype)
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        seen = req_to_token[row, :length].long()
        out[i : i + 1] = _attend(q[i : i + 1], keys[seen], values[seen], scaling, None)


def extend_attention(
    q: Tensor,
    _: Tensor,
    __: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor,
    starts: Tensor,
    ___: int,
    scaling: float,
    *rest: Any,
) -> None:
    """Several new tokens for each request, which are stored already.

    They are causal, unless the last argument is a mask, (requests * new * new).
    """
    tree_mask: Tensor | None = rest[-1]
    sizes = zip(*(it.tolist() for it in (rows, seq_lens, new_lens, starts)), strict=True)
    for i, (row, length, new, at) in enumerate(sizes):
        seen = req_to_token[row, :length].long()
        own = torch.ones(new, new, dtype=torch.bool).tril()
        if tree_mask is not None:
            own = tree_mask.view(-1, new, new)[i].bool()
        mask = torch.cat((torch.ones(new, length - new, dtype=torch.bool), own), dim=1)
        out[at : at + new] = _attend(q[at : at + new], keys[seen], values[seen], scaling, mask)
