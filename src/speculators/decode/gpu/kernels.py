"""Triton kernels for the parts of a step that transformers runs as many small ones.

They round where transformers' code does, so results differ by the order of sums only. Triton comes
with PyTorch's CUDA builds; a kernel is compiled when it is first launched, which takes some tenths
of a second, and kept on disk.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend", "gated_silu", "mask", "rms_norm", "rotate", "write"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, one operation after the other."""

SPLIT_SLOTS = 512
"""How many slots a program attends to, before further ones are given to another program."""

MAX_PROGRAMS = 256
"""Enough programs to keep a GPU busy; attention is not split up among more."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale vectors, (..., width), to a mean square of 1, and then by ``weight``, (width).

    The vectors may be parts of wider ones.
    """
    flat = dense_vectors(x.reshape(-1, x.shape[-1]))
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = flat.shape[1]
    block = triton.next_power_of_2(width)
    _rms_norm[(len(flat),)](flat, weight, normed, flat.stride(0), width, epsilon, block)
    return normed


def dense_vectors(x: Tensor) -> Tensor:
    """The same values, with those of the last dimension one after the other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["x_row", "width"])
def _rms_norm(x, weight, normed, x_row, width, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    scaled = (value * scale).to(gain.dtype).to(tl.float32) * gain.to(tl.float32)
    tl.store(normed + row * width + column, scaled.to(gain.dtype), mask=inside)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, of the same shape."""
    gate, up = gate.contiguous(), up.contiguous()
    product = torch.empty_like(gate)
    count, block = gate.numel(), 1024
    _gated_silu[(triton.cdiv(count, block),)](gate, up, product, count, block)
    return product


@triton.jit
def _gated_silu(gate, up, product, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    stored = tl.load(gate + at, mask=inside, other=0.0)
    value = stored.to(tl.float32)
    silu = (value / (1 + tl.exp(-value))).to(stored.dtype).to(tl.float32)
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + at, (silu * other).to(stored.dtype), mask=inside)


def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys, (rows, heads, length, head size).

    Args:
        queries: to be rotated.
        keys: likewise; there may be fewer heads.
        cos: (rows or 1, length, head size).
        sin: likewise.

    """
    rows, heads, length, size = queries.shape
    rotated = [torch.empty_like(states) for states in (queries, keys)]
    by_row = 0 if len(cos) == 1 else 1
    cos, sin = cos.contiguous(), sin.contiguous()
    _rotate[(rows * length, heads + keys.shape[1])](
        queries,
        keys,
        cos,
        sin,
        *rotated,
        *queries.stride()[:3],
        *keys.stride()[:3],
        *rotated[0].stride()[:3],
        *rotated[1].stride()[:3],
        heads,
        length,
        by_row,
        size // 2,
        triton.next_power_of_2(size // 2),
        num_warps=1,
        enable_fp_fusion=False,  # or a product is added before it is rounded
    )
    return rotated[0], rotated[1]


@triton.jit(do_not_specialize=["heads", "length", "by_row"])
def _rotate(
    queries,
    keys,
    cos,
    sin,
    rotated_queries,
    rotated_keys,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    rq_row,
    rq_head,
    rq_token,
    rk_row,
    rk_head,
    rk_token,
    heads,
    length,
    by_row,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // length).to(tl.int64)
    token = tl.program_id(0) % length
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    angle = (row * by_row * length + token) * 2 * HALF + column
    cos_low = tl.load(cos + angle, mask=inside).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF, mask=inside).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=inside).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF, mask=inside).to(tl.float32)
    if head < heads:
        source = queries + row * q_row + head * q_head + token * q_token + column
        to = rotated_queries + row * rq_row + head * rq_head + token * rq_token + column
    else:
        head -= heads
        source = keys + row * k_row + head * k_head + token * k_token + column
        to = rotated_keys + row * rk_row + head * rk_head + token * rk_token + column
    low = tl.load(source, mask=inside)
    high = tl.load(source + HALF, mask=inside)
    dtype = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    # Each product is rounded, as it is where they are kernels of their own.
    low_cos = (low * cos_low).to(dtype).to(tl.float32)
    high_sin = (high * sin_low).to(dtype).to(tl.float32)
    high_cos = (high * cos_high).to(dtype).to(tl.float32)
    low_sin = (low * sin_high).to(dtype).to(tl.float32)
    tl.store(to, (low_cos - high_sin).to(dtype), mask=inside)
    tl.store(to + HALF, (high_cos + low_sin).to(dtype), mask=inside)


def write(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, at: Tensor) -> None:
    """See ``BlockCache.write``."""
    new_keys, new_values = dense_vectors(new_keys), dense_vectors(new_values)
    rows, heads, length, size = new_keys.shape
    _write[(rows * length, heads)](
        keys,
        values,
        new_keys,
        new_values,
        at,
        *keys.stride()[:3],
        *values.stride()[:3],
        *new_keys.stride()[:3],
        *new_values.stride()[:3],
        length,
        size,
        new_values.shape[3],
        triton.next_power_of_2(max(size, new_values.shape[3])),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["length", "size", "value_size"])
def _write(
    keys,
    values,
    new_keys,
    new_values,
    at,
    k_row,
    k_head,
    k_slot,
    v_row,
    v_head,
    v_slot,
    nk_row,
    nk_head,
    nk_token,
    nv_row,
    nv_head,
    nv_token,
    length,
    size,
    value_size,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // length).to(tl.int64)
    token = tl.program_id(0) % length
    head = tl.program_id(1)
    slot = tl.load(at + row * length + token)
    column = tl.arange(0, BLOCK)
    inside = column < size
    new = tl.load(new_keys + row * nk_row + head * nk_head + token * nk_token + column, mask=inside)
    tl.store(keys + row * k_row + head * k_head + slot * k_slot + column, new, mask=inside)
    inside = column < value_size
    new = tl.load(
        new_values + row * nv_row + head * nv_head + token * nv_token + column, mask=inside
    )
    tl.store(values + row * v_row + head * v_head + slot * v_slot + column, new, mask=inside)


def mask(
    starts: Tensor,
    padded: Tensor | None,
    queries: int,
    unconfirmed: int,
    slots: int,
    dtype: torch.dtype,
    block: Tensor | None,
    window: int | None,
    depths: Tensor | None,
) -> Tensor:
    """See ``BlockCache.mask``.

    Args:
        starts: (rows, 1), the first unconfirmed slot.
        padded: (rows, 1), the number of slots with padding, if there are any.
        queries: the length of the block.
        unconfirmed: the number of unconfirmed nodes before the block.
        slots: the number of slots.
        dtype: of the mask.
        block: (rows or 1, queries, nodes), of booleans.
        window: as for ``BlockCache.mask``.
        depths: likewise.

    """
    rows, nodes = len(starts), unconfirmed + queries
    made = torch.empty(rows, 1, queries, slots, dtype=dtype, device=starts.device)
    tile = min(1024, triton.next_power_of_2(slots))
    _mask[(rows * queries, triton.cdiv(slots, tile))](
        made,
        starts,
        starts if padded is None else padded,
        starts if block is None else block.contiguous(),
        starts if depths is None else depths.contiguous(),
        queries,
        unconfirmed,
        slots,
        0 if window is None else window,
        0 if block is None or len(block) == 1 else queries * nodes,
        0 if depths is None or len(depths) == 1 else nodes,
        starts.stride(0),
        0 if padded is None else padded.stride(0),
        torch.finfo(dtype).min,
        padded is not None,
        block is not None,
        window is not None,
        tile,
    )
    return made


@triton.jit(
    do_not_specialize=[
        "queries",
        "unconfirmed",
        "slots",
        "window",
        "block_row",
        "depth_row",
        "start_row",
        "padded_row",
    ]
)
def _mask(
    made,
    starts,
    padded,
    block,
    depths,
    queries,
    unconfirmed,
    slots,
    window,
    block_row,
    depth_row,
    start_row,
    padded_row,
    lowest,
    PADDED: tl.constexpr,
    TREE: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = (tl.program_id(0) // queries).to(tl.int64)
    query = tl.program_id(0) % queries
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = tl.load(starts + row * start_row)
    node = slot - start
    nodes = unconfirmed + queries
    drafted = (node >= 0) & (node < nodes)
    if TREE:
        seen = tl.load(block + row * block_row + query * nodes + node, mask=drafted, other=0)
        visible = (node < 0) | (seen != 0)
    else:
        visible = node <= unconfirmed + query
    if PADDED:
        visible = visible & (slot >= tl.load(padded + row * padded_row))
    if WINDOWED:
        depth = tl.load(depths + row * depth_row + query)
        other = tl.load(depths + row * depth_row + node, mask=drafted, other=0)
        visible = visible & (start + depth - tl.where(drafted, start + other, slot) < window)
    hidden = tl.where(visible, 0.0, lowest)
    to = made + (row * queries + query) * slots + slot
    tl.store(to, hidden.to(made.dtype.element_ty), mask=slot < slots)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    length: int,
    scale: float,
) -> Tensor:
    """Attention over the slots of a cache that are in use.

    Args:
        queries: (rows, heads, nodes, head size).
        keys: (rows, key-value heads, slots, head size), the number of heads divides that of the
            queries.
        values: likewise.
        mask: (rows or 1, 1, nodes, slots), added to the scores.
        starts: (rows, 1), the first slot of the block in each row.
        length: how many slots after that are in use.
        scale: of the scores.

    Returns:
        (rows, nodes, heads, head size).

    """
    rows, heads, nodes, size = queries.shape
    groups = keys.shape[1]
    group = heads // groups
    attended = queries.new_empty(rows, nodes, heads, size)
    block_m = min(64, max(16, triton.next_power_of_2(nodes * group)))
    tiles = triton.cdiv(nodes * group, block_m)
    splits = max(1, min(keys.shape[2] // SPLIT_SLOTS, MAX_PROGRAMS // (tiles * groups * rows)))
    # With several splits, each leaves its part here, to be combined: sums, and their scales.
    parts = queries.new_empty(splits, rows * nodes * heads, size, dtype=torch.float32)
    scales = queries.new_empty(splits, 2, rows * nodes * heads, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(size))
    _attend[(tiles, groups, rows * splits)](
        queries,
        keys,
        values,
        mask,
        starts,
        attended,
        parts,
        scales,
        *queries.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        mask.stride(0) if len(mask) > 1 else 0,
        mask.stride(2),
        starts.stride(0),
        scale,
        length,
        nodes,
        rows,
        size,
        group,
        groups,
        block_d,
        block_m,
        64 if block_d * keys.element_size() <= 256 else 32,
        splits,
    )
    if splits > 1:
        _combine[(rows * nodes * heads,)](
            parts, scales, attended, rows * nodes * heads, size, block_d, splits
        )
    return attended


@triton.jit(do_not_specialize=["length", "nodes", "rows", "start_row"])
def _attend(
    queries,
    keys,
    values,
    mask,
    starts,
    attended,
    parts,
    scales,
    q_row,
    q_head,
    q_node,
    k_row,
    k_head,
    k_slot,
    v_row,
    v_head,
    v_slot,
    mask_row,
    mask_node,
    start_row,
    scale,
    length,
    nodes,
    rows,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = (tl.program_id(2) // SPLITS).to(tl.int64)
    split = tl.program_id(2) % SPLITS
    group = tl.program_id(1)
    # The queries of all heads that share keys and values, node by node.
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node = query // GROUP
    head = group * GROUP + query % GROUP
    real = node < nodes
    column = tl.arange(0, BLOCK_D)
    inside = column < SIZE
    q_at = row * q_row + head * q_head + node * q_node
    q = tl.load(
        queries + q_at[:, None] + column[None], mask=real[:, None] & inside[None], other=0.0
    )
    end = tl.load(starts + row * start_row).to(tl.int32) + length
    per_split = tl.cdiv(tl.cdiv(end, BLOCK_N), SPLITS) * BLOCK_N
    low = split * per_split
    high = tl.minimum(end, low + per_split)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_base = keys + row * k_row + group * k_head
    v_base = values + row * v_row + group * v_head
    mask_base = mask + row * mask_row + node * mask_node
    for first in range(low, high, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        used = slot < high
        k = tl.load(
            k_base + slot[None] * k_slot + column[:, None],
            mask=used[None] & inside[:, None],
            other=0.0,
        )
        v = tl.load(
            v_base + slot[:, None] * v_slot + column[None],
            mask=used[:, None] & inside[None],
            other=0.0,
        )
        bias = tl.load(mask_base[:, None] + slot[None], mask=real[:, None] & used[None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale + bias.to(tl.float32)
        scores = tl.where(used[None], scores, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        shrink = tl.exp(before - largest)
        weights = tl.exp(scores - largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None]
        summed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    result = (row * nodes + node) * (GROUP * GROUPS) + head
    if SPLITS == 1:
        tl.store(
            attended + result[:, None] * SIZE + column[None],
            (summed / total[:, None]).to(q.dtype),
            mask=real[:, None] & inside[None],
        )
    else:
        count = rows * nodes * GROUP * GROUPS
        tl.store(
            parts + (split * count + result[:, None]) * SIZE + column[None],
            summed,
            mask=real[:, None] & inside[None],
        )
        tl.store(scales + split * 2 * count + result, largest, mask=real)
        tl.store(scales + (split * 2 + 1) * count + result, total, mask=real)


@triton.jit(do_not_specialize=["count"])
def _combine(
    parts, scales, attended, count, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):
    result = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < SIZE
    largest = tl.load(scales + result)
    total = tl.load(scales + count + result)
    summed = tl.load(parts + result * SIZE + column, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        # The first split is never empty; a later one may be, and then has no largest score.
        other = tl.load(scales + split * 2 * count + result)
        both = tl.maximum(largest, other)
        shrink, weight = tl.exp(largest - both), tl.exp(other - both)
        total = total * shrink + weight * tl.load(scales + (split * 2 + 1) * count + result)
        part = tl.load(parts + (split * count + result) * SIZE + column, mask=inside, other=0.0)
        summed = summed * shrink + weight * part
        largest = both
    tl.store(
        attended + result * SIZE + column,
        (summed / total).to(attended.dtype.element_ty),
        mask=inside,
    )
