"""What the Triton kernels of ``cpm.SparseAttention`` share: tiles of rows, and an online softmax.

Queries that share a kv head become the rows of one tile: POSITIONS neighbouring positions times the heads of
the group. A head of fewer than WIDTH floats, the next power of two of at least 16, is padded with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Finite, so that a row that has seen nothing yet gives no NaN; its sums are dropped by a factor exp2(LOWEST).
LOWEST = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_position(past_length, rows, capacity):
    """The position of the first new row; whatever past_length says, no new row is beyond the buffers."""
    return tl.maximum(tl.minimum(tl.load(past_length), capacity - rows), 0)


@triton.jit
def load_rows(base, rows, valid, D: tl.constexpr, WIDTH: tl.constexpr):
    """(len(rows), WIDTH) of a matrix whose rows have D elements; zeros where ``valid`` is false."""
    column = tl.arange(0, WIDTH)
    where = base + rows[:, None] * D + column[None, :]
    if WIDTH == D:
        tile = tl.load(where, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(where, mask=valid[:, None] & (column < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(base, rows, valid, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of ``load_rows``."""
    column = tl.arange(0, WIDTH)
    where = base + rows[:, None] * D + column[None, :]
    if WIDTH == D:
        tl.store(where, tile, mask=valid[:, None])
    else:
        tl.store(where, tile, mask=valid[:, None] & (column < D)[None, :])


@triton.jit
def fold(scores, visible, top, total):
    """Running maximum and sum of exp2 of each row, after these scores: (top, total, weights, rescale)."""
    scores = tl.where(visible, scores, LOWEST)
    above = tl.maximum(top, tl.max(scores, 1))
    weights = tl.where(visible, tl.exp2(scores - above[:, None]), 0.0)
    rescale = tl.exp2(top - above)
    return above, total * rescale + tl.sum(weights, 1), weights, rescale
