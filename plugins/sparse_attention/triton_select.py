"""InfLLM-V2's choice of blocks on NVIDIA GPUs (``spec.py``, "Selection"): statistics, scores, best blocks.

Tiles of queries: row r is head r % HEADS of position r // HEADS; HEADS is a power of two, and rows of heads
beyond GROUP are empty. Windows are pooled keys; with n keys, max(n // STRIDE - 1, 0) are complete. Tiles
whose positions are all below ``dense_len`` do nothing here but list all their blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cpm_edge.plugins.sparse_attention.triton_tiles import LOG2E, LOWEST, first_position, fold, load_rows

# spec.EXPONENT_LIMIT, in powers of two.
LIMIT = tl.constexpr(80 * 1.4426950408889634)


@triton.jit
def block_statistics(
    query, pooled, past_length, statistics, rows, kv_heads, capacity, dense_len, splits, scale,
    COARSE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Maximum and normaliser of every row's softmax over its windows, coarse windows with COARSE.

    Grid (ceil(rows / POSITIONS), kv_heads, splits); a split takes every splits-th tile of windows.

    Args:
        query: (rows, kv_heads * GROUP * D) float16.
        pooled: (kv_heads, capacity / STRIDE, D) float16.
        statistics: (tiles, kv_heads, splits, 2, POSITIONS * HEADS) float32, of base-2 logarithms.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ROWS: tl.constexpr = POSITIONS * HEADS
    past = first_position(past_length, rows, capacity)
    first = tile * POSITIONS
    last = past + tl.minimum(first + POSITIONS, rows) - 1
    if last + 1 < dense_len:
        return
    row = tl.arange(0, ROWS)
    position, group = first + row // HEADS, row % HEADS
    queries = load_rows(
        query, (position * kv_heads + head) * GROUP + group, (position < rows) & (group < GROUP), D, WIDTH
    )
    keys = pooled + head.to(tl.int64) * (capacity // STRIDE) * D
    factor = scale * LOG2E
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    lane = tl.arange(0, TILE)
    length = past + position + 1
    limit = length // STRIDE - 1
    bound = tl.maximum((last + 1) // STRIDE - 1, 0)
    if COARSE:
        coarse = length // (4 * STRIDE) - 1
        count = tl.maximum((last + 1) // (4 * STRIDE) - 1, 0)
        for start in range(split * TILE, count, splits * TILE):
            window = start + lane
            # Four pooled keys, two strides apart, tile a coarse window.
            mean = tl.zeros((TILE, WIDTH), tl.float32)
            for part in tl.static_range(4):
                mean += load_rows(keys, 4 * window + 2 * part, window < count, D, WIDTH).to(tl.float32)
            scores = tl.dot(queries, tl.trans((mean * 0.25).to(tl.float16))) * factor
            top, total, _, _ = fold(scores, window[None, :] < coarse[:, None], top, total)
        # Rows that see no coarse window use their own; only the first few positions are such.
        limit = tl.where(coarse > 0, 0, limit)
        bound = tl.where((past + first + 1) // (4 * STRIDE) > 1, 0, bound)
    for start in range(split * TILE, bound, splits * TILE):
        window = start + lane
        scores = tl.dot(queries, tl.trans(load_rows(keys, window, window < bound, D, WIDTH))) * factor
        top, total, _, _ = fold(scores, window[None, :] < limit[:, None], top, total)
    target = statistics + (((tile * kv_heads + head) * splits + split) * 2) * ROWS + row
    tl.store(target, top)
    tl.store(target + ROWS, total)


@triton.jit
def block_scores(
    query, pooled, past_length, statistics, scores, rows, kv_heads, capacity, dense_len,
    scale,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores of TILE blocks; grid (ceil(rows / POSITIONS), kv_heads, ceil(capacity / (4 STRIDE TILE))).

    Args:
        statistics: of ``block_statistics`` with SPLITS splits.
        scores: (rows, kv_heads, 2, capacity / (4 STRIDE)) float32, 0 or more: the best of the four windows
            that begin in a block, and the last of them, which counts for the next block too. Written for
            the blocks that a position sees; a block without a complete window has 0.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    ROWS: tl.constexpr = POSITIONS * HEADS
    BLOCK: tl.constexpr = 4 * STRIDE
    past = first_position(past_length, rows, capacity)
    first = tile * POSITIONS
    last = past + tl.minimum(first + POSITIONS, rows) - 1
    if (last + 1 < dense_len) | (tl.program_id(2) * TILE > last // BLOCK):
        return
    row = tl.arange(0, ROWS)
    position, group = first + row // HEADS, row % HEADS
    valid = (position < rows) & (group < GROUP)
    queries = load_rows(query, (position * kv_heads + head) * GROUP + group, valid, D, WIDTH)
    part = tl.arange(0, SPLITS)[:, None] * (2 * ROWS) + row[None, :]
    found = statistics + (tile * kv_heads + head) * (SPLITS * 2 * ROWS) + part
    tops = tl.load(found)
    top = tl.max(tops, 0)
    total = tl.sum(tl.load(found + ROWS) * tl.exp2(tops - top[None, :]), 0)
    inverse = 1.0 / tl.maximum(total, 1.0e-30)
    keys = pooled + head.to(tl.int64) * (capacity // STRIDE) * D
    limit = tl.where(valid, (past + position + 1) // STRIDE - 1, 0)
    bound = (last + 1) // STRIDE - 1
    block = tl.program_id(2) * TILE + tl.arange(0, TILE)
    best = tl.zeros((POSITIONS, TILE), tl.float32)
    shared = best
    for part in tl.static_range(4):
        window = 4 * block + part
        tile_keys = load_rows(keys, window, window < bound, D, WIDTH)
        exponent = tl.dot(queries, tl.trans(tile_keys)) * (scale * LOG2E) - top[:, None]
        visible = window[None, :] < limit[:, None]
        weight = tl.exp2(tl.where(visible, tl.minimum(exponent, LIMIT), LOWEST)) * inverse[:, None]
        shared = tl.sum(tl.reshape(weight, (POSITIONS, HEADS, TILE)), 1)
        best = tl.maximum(best, shared)
    place = first + tl.arange(0, POSITIONS)
    blocks = capacity // BLOCK
    target = scores + ((place * kv_heads + head) * (2 * blocks))[:, None] + block[None, :]
    stored = (place < rows)[:, None] & (block[None, :] <= ((past + place) // BLOCK)[:, None])
    tl.store(target, best, mask=stored)
    tl.store(target + blocks, shared, mask=stored)


@triton.jit
def select_blocks(
    scores, past_length, chosen, counts, rows, kv_heads, capacity, dense_len,
    init_blocks, local_blocks, budget,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The blocks that the positions of a tile attend to, ascending; grid (ceil(rows / POSITIONS), kv_heads).

    A block's score is the best of its windows and of the one before, infinite for forced blocks. The score
    that the budget ends at is found bit by bit: floats of one sign are ordered like their bits.

    Args:
        scores: of ``block_scores``; N is a power of two of at least capacity / BLOCK.
        chosen: (tiles, kv_heads, capacity / BLOCK) int32: a block, plus 2^16 << p for each position p of the
            tile that attends to it; written up to the count.
        counts: (tiles, kv_heads) int32.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    past = first_position(past_length, rows, capacity)
    first = tile * POSITIONS
    last = past + tl.minimum(first + POSITIONS, rows) - 1
    place = tl.arange(0, POSITIONS)
    block = tl.arange(0, N)
    blocks = capacity // BLOCK
    # Positions that are not there see no block.
    current = tl.where(first + place < rows, (past + first + place) // BLOCK, -1)
    seen = block[None, :] <= current[:, None]
    sparse = past + first + place + 1 >= dense_len
    listed = seen & sparse[:, None]
    source = scores + (((first + place) * kv_heads + head) * (2 * blocks))[:, None] + block[None, :]
    found = tl.load(source, mask=listed, other=0.0)
    before = tl.load(source + blocks - 1, mask=listed & (block > 0)[None, :], other=0.0)
    forced = (block < init_blocks)[None, :] | (block[None, :] > current[:, None] - local_blocks)
    found = tl.where(forced, float("inf"), tl.maximum(found, before))
    rank = tl.where(listed, found.to(tl.int32, bitcast=True), -1)
    wanted = tl.minimum(current + 1, budget)
    worst = tl.zeros((POSITIONS,), tl.int32)
    # No search below dense_len; as an `if` this costs stack memory.
    for bit in range(tl.where(last + 1 < dense_len, 0, 31)):
        candidate = worst | (1 << (30 - bit))
        enough = tl.sum((rank >= candidate[:, None]).to(tl.int32), 1) >= wanted
        worst = tl.where(enough, candidate, worst)
    better = (rank > worst[:, None]).to(tl.int32)
    equal = (rank == worst[:, None]).to(tl.int32)
    room = wanted - tl.sum(better, 1)
    best = (better > 0) | ((equal > 0) & (tl.cumsum(equal, 1) <= room[:, None]))
    mine = seen & (best | (sparse == 0)[:, None])
    bits = tl.sum(mine.to(tl.int32) << place[:, None], 0)
    used = (bits > 0).to(tl.int32)
    tl.store(counts + tile * kv_heads + head, tl.sum(used, 0))
    target = chosen + (tile * kv_heads + head) * blocks + tl.cumsum(used, 0) - 1
    tl.store(target, block | (bits << 16), mask=used > 0)
