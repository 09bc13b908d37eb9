"""The cache of ``cpm.SparseAttention`` on NVIDIA GPUs: new rows, and the pooled keys that they complete."""

from __future__ import annotations

import triton
import triton.language as tl

from cpm_edge.plugins.sparse_attention.triton_tiles import first_position, load_rows, store_rows


@triton.jit
def append_rows(
    key, value, past_length, keys, values, pooled, rows, kv_heads, capacity,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write TILE new rows of one kv head and at most one pooled key; grid (ceil(rows / TILE), kv_heads).

    A pooled key is the mean of 2 * TILE stored keys, summed in float32. Those of this launch come from the
    input, because another program may not have written them yet.

    Args:
        key, value: (rows, kv_heads * D) float16.
        past_length: (1,) int32.
        keys, values: (kv_heads, capacity, D) float16, in place; rows is at most capacity.
        pooled: (kv_heads, capacity / TILE, D) float16, in place; None for dense attention. TILE is then the
            stride of the pooled keys.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    past = first_position(past_length, rows, capacity)
    start = head.to(tl.int64) * capacity * D
    row = tile * TILE + tl.arange(0, TILE)
    valid = row < rows
    new_rows = row * kv_heads + head
    store_rows(keys + start, past + row, valid, load_rows(key, new_rows, valid, D, WIDTH), D, WIDTH)
    store_rows(values + start, past + row, valid, load_rows(value, new_rows, valid, D, WIDTH), D, WIDTH)
    if pooled is not None:
        window = tl.maximum(past // TILE - 1, 0) + tile
        if window < (past + rows) // TILE - 1:
            token = window * TILE + tl.arange(0, 2 * TILE)
            old = load_rows(keys + start, token, token < past, D, WIDTH)
            new = load_rows(key, (token - past) * kv_heads + head, token >= past, D, WIDTH)
            mean = tl.sum(old.to(tl.float32) + new.to(tl.float32), 0) / (2 * TILE)
            column = tl.arange(0, WIDTH)
            target = pooled + head.to(tl.int64) * (capacity // TILE) * D + window * D + column
            tl.store(target, mean.to(tl.float16), mask=column < D)
