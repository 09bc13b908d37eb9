"""``cpm.LinearAttention`` on NVIDIA GPUs: float16 rows, a float32 state that is updated in place.

A program holds SIZE x BLOCK_V numbers of one head's state, because its columns do not depend on each other.
Where past_state and present_state are one buffer, each number is read before it is written, by one program.

What tensor cores round: products of float16 are exact and their sums float32. Scores and the state, where
they make an output, are tf32 (11 bits, nothing adds up), because float16 could overflow. Decayed keys go into
the state as two float16 each, together 22 bits: what is lost there stays in the state.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear_recurrent(
    query, key, value, past_state, decay, output, present_state, width, scale,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row, all in float32; shapes as in ``spec.py``, decay (H,) logarithms, width = H * VALUE_SIZE.

    Args:
        BLOCK_D: SIZE rounded up to a power of two.
        BLOCK_V: columns of the state a program, a divisor of VALUE_SIZE.
    """
    column = tl.program_id(0) * BLOCK_V
    head = column // VALUE_SIZE
    lane, place = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_d = lane < SIZE
    q = tl.load(query + head * SIZE + lane, mask=in_d, other=0).to(tl.float32)
    k = tl.load(key + head * SIZE + lane, mask=in_d, other=0).to(tl.float32)
    v = tl.load(value + column + place).to(tl.float32)
    keep = tl.exp(tl.load(decay + head))
    at = (head * SIZE + lane[:, None]) * VALUE_SIZE + (column % VALUE_SIZE + place)[None, :]
    state = tl.load(past_state + at, mask=in_d[:, None], other=0)
    state = keep * state + k[:, None] * v[None, :]
    tl.store(present_state + at, state, mask=in_d[:, None])
    tl.store(output + column + place, scale * tl.sum(q[:, None] * state, 0))


@triton.jit
def _round_tf32(x):
    """To the nearest number of 11 bits: tensor cores cut off the rest, which would shrink every result."""
    return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)


@triton.jit
def linear_chunked(
    query, key, value, past_state, decay, output, present_state, rows, width, scale,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Any number of rows, CHUNK at a time on tensor cores; arguments as above."""
    column = tl.program_id(0) * BLOCK_V
    head, heads = column // VALUE_SIZE, width // VALUE_SIZE
    lane, place, row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, CHUNK)
    in_d = lane < SIZE
    g = tl.load(decay + head)
    distance = row[:, None] - row[None, :]
    within = tl.where(distance >= 0, tl.exp(g * tl.maximum(distance, 0)), 0)
    from_start = scale * tl.exp(g * (row + 1))
    at = (head * SIZE + lane[:, None]) * VALUE_SIZE + (column % VALUE_SIZE + place)[None, :]
    state = tl.load(past_state + at, mask=in_d[:, None], other=0)
    for start in range(0, rows, CHUNK):
        count = tl.minimum(rows - start, CHUNK)
        in_rows = row < count
        first = (start + row).to(tl.int64) * heads
        at_key = ((first + head) * SIZE)[:, None] + lane[None, :]
        key_mask = in_rows[:, None] & in_d[None, :]
        q = tl.load(query + at_key, mask=key_mask, other=0)
        k = tl.load(key + at_key, mask=key_mask, other=0)
        at_value = (first * VALUE_SIZE + column)[:, None] + place[None, :]
        v = tl.load(value + at_value, mask=in_rows[:, None], other=0)
        scores = _round_tf32(tl.dot(q, tl.trans(k)) * within)
        inner = tl.dot(scores, v.to(tl.float32), input_precision="tf32")
        past = tl.dot(q.to(tl.float32), _round_tf32(state), input_precision="tf32")
        tl.store(output + at_value, scale * inner + from_start[:, None] * past, mask=in_rows[:, None])
        # Rows beyond the last have keys of 0; the exponent must not be above 0 for them.
        decayed = k.to(tl.float32) * tl.exp(g * tl.maximum(count - 1 - row, 0))[:, None]
        high = decayed.to(tl.float16)
        low = (decayed - high.to(tl.float32)).to(tl.float16)
        added = tl.dot(tl.trans(low), v)
        state = tl.exp(g * count) * state + tl.dot(tl.trans(high), v, added)
    tl.store(present_state + at, state, mask=in_d[:, None])
