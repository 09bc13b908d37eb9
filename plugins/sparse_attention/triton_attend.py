"""Softmax attention of ``cpm.SparseAttention`` on NVIDIA GPUs, over all keys or the chosen blocks.

A tile has POSITIONS positions and ROWS rows: row r is head r % HEADS of position r // HEADS; HEADS is at
least GROUP. It reads each block of keys once for all its rows. Decode splits the blocks of a tile over
several programs, so that a model with two kv heads fills a chip, and joins their parts afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cpm_edge.plugins.sparse_attention.triton_tiles import (
    LOG2E,
    LOWEST,
    first_position,
    fold,
    load_rows,
    store_rows,
)


@triton.jit
def attend(
    query, keys, values, past_length, chosen, counts, output, partial, partial_statistics,
    rows, kv_heads, capacity, splits, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries; grid (ceil(rows / POSITIONS), kv_heads, splits).

    Args:
        query: (rows, kv_heads * GROUP * D) float16.
        keys, values: (kv_heads, capacity, D) float16, the new rows included.
        chosen, counts: of ``select_blocks``; None to attend to all keys.
        output: (rows, kv_heads * GROUP * D) float16; None where the blocks are split.
        partial: (tiles, kv_heads, splits, ROWS, D) float32, sums of values not yet normalised; else None.
        partial_statistics: (tiles, kv_heads, splits, 2, ROWS) float32: maximum (of base-2 logarithms), sum.
    """
    # Long tiles first: the last ones fill what the others leave.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, split = tl.program_id(1), tl.program_id(2)
    past = first_position(past_length, rows, capacity)
    length = past + rows
    first = tile * POSITIONS
    last = tl.minimum(past + first + POSITIONS, length) - 1
    row = tl.arange(0, ROWS)
    place, group = row // HEADS, row % HEADS
    source = ((first + place) * kv_heads + head) * GROUP + group
    valid = (place < POSITIONS) & (first + place < rows) & (group < GROUP)
    queries = load_rows(query, source, valid, D, WIDTH)
    position = past + first + place
    start = head.to(tl.int64) * capacity * D
    if chosen is None:
        count = last // BLOCK + 1
    else:
        count = tl.load(counts + tile * kv_heads + head)
        chosen += (tile * kv_heads + head) * (capacity // BLOCK)
    each = tl.cdiv(count, splits)
    begin = split * each
    factor = scale * LOG2E
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for index in range(begin, tl.minimum(begin + each, count)):
        if chosen is None:
            token = index * BLOCK + tl.arange(0, BLOCK)
            visible = token[None, :] <= position[:, None]
        else:
            entry = tl.load(chosen + index)
            token = (entry & 0xFFFF) * BLOCK + tl.arange(0, BLOCK)
            mine = ((entry >> 16) >> place) & 1
            visible = (token[None, :] <= position[:, None]) & (mine > 0)[:, None]
        tile_keys = load_rows(keys + start, token, token < length, D, WIDTH)
        scores = tl.dot(queries, tl.trans(tile_keys)) * factor
        top, total, weights, rescale = fold(scores, visible, top, total)
        tile_values = load_rows(values + start, token, token < length, D, WIDTH)
        sums = tl.dot(weights.to(tl.float16), tile_values, sums * rescale[:, None])
    if partial is None:
        # Rows that are not there may have seen nothing.
        result = (sums / tl.where(total > 0, total, 1.0)[:, None]).to(tl.float16)
        store_rows(output, source, valid, result, D, WIDTH)
    else:
        part = (tile * kv_heads + head) * splits + split
        store_rows(partial + part.to(tl.int64) * ROWS * D, row, valid, sums, D, WIDTH)
        tl.store(partial_statistics + part * (2 * ROWS) + row, top)
        tl.store(partial_statistics + part * (2 * ROWS) + ROWS + row, total)


@triton.jit
def join_splits(
    partial, partial_statistics, output, rows, heads,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Output (rows, heads * D) float16 of the parts of SPLITS programs; grid (rows, heads)."""
    position, head = tl.program_id(0), tl.program_id(1)
    tile = position // POSITIONS
    row = (position % POSITIONS) * HEADS + head % GROUP
    part = (tile * (heads // GROUP) + head // GROUP) * SPLITS + tl.arange(0, SPLITS)
    tops = tl.load(partial_statistics + part * (2 * ROWS) + row)
    weights = tl.exp2(tops - tl.max(tops, 0))
    total = tl.sum(weights * tl.load(partial_statistics + part * (2 * ROWS) + ROWS + row), 0)
    sums = load_rows(partial, part * ROWS + row, part >= 0, D, WIDTH)
    column = tl.arange(0, WIDTH)
    result = tl.sum(sums * weights[:, None], 0) / total
    target = output + (position * heads + head) * D + column
    tl.store(target, result.to(tl.float16), mask=column < D)
