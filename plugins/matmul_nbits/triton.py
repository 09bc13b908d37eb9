"""``cpm.MatMulNBits`` on NVIDIA GPUs: float16 activations, weights of 8, 4 or 2 bits, float32 sums.

Weights lie as ``spans.py`` says. A product sums code - zero, small integers that float16 holds exactly,
within a group, and meets the scale in float32: the weights are never rounded to a scaled float16.

A decode step too runs on tensor cores, whose smallest tile has 8 rows of x: a thread then takes 4 to 5.5
instructions a weight instead of 6 to 7, and an Orin with a low clock is limited by those before its memory.
Weights are the first operand of a dot, so that each warp unpacks rows of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(packed, zero, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """code - zero as float16, of the bits from SHIFT on.

    The bits after the point of 0x6400, which is 1024, count ones: set a code there, and what is left to do is
    one multiply-add. Conversions of integers run at a fraction of its rate, and shifts are spared too.
    """
    code = packed.to(tl.int32) & (((1 << BITS) - 1) << SHIFT)
    raised = (code | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
    LOWER: tl.constexpr = 2.0**-SHIFT
    return raised * LOWER - (zero + 1024 * LOWER)


@triton.jit
def _tile(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr = 8):
    """The tile of a program: by columns within GROUP_M tiles of rows, so that running ones share operands."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    high = tl.minimum(tiles_m - first, GROUP_M)
    place = program % (GROUP_M * tiles_n)
    tokens = (first + place % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = place // high * BLOCK_N + tl.arange(0, BLOCK_N)
    return tokens, columns


@triton.jit
def nbits_product(
    x, codes, scales, zeros, y, m, n, k, row_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y (m, n) = x (m, k) . weight^T in tiles of BLOCK_M x BLOCK_N.

    Args:
        row_bytes: of a row of codes; zeros is None for the constant zero point ZERO.
        UNROLL: spans a step.
    """
    PARTS: tl.constexpr = 8 // BITS
    PART: tl.constexpr = SPAN // PARTS
    # Parts that lie in one group: all of them, unless groups are narrower than a span.
    TOGETHER: tl.constexpr = GROUP // PART
    tokens, columns = _tile(m, n, BLOCK_M, BLOCK_N)
    lane = tl.arange(0, PART)
    in_n, in_m = columns < n, tokens < m
    weight = codes + columns.to(tl.int64)[:, None] * row_bytes + lane[None, :]
    inputs = x + tokens.to(tl.int64)[None, :] * k
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for span in tl.range(0, row_bytes // PART, loop_unroll_factor=UNROLL):
        packed = tl.load(weight + span * PART, mask=in_n[:, None], other=0)
        for g in tl.static_range(PARTS // TOGETHER):
            at = (span * (SPAN // GROUP) + g) * n + columns
            scale = tl.load(scales + at, mask=in_n, other=0).to(tl.float32)
            if zeros is None:
                zero = tl.full((BLOCK_N,), ZERO, tl.float16)
            else:
                zero = tl.load(zeros + at, mask=in_n, other=0).to(tl.float16)
            partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for p in tl.static_range(TOGETHER):
                column = span * SPAN + (g * TOGETHER + p) * PART + lane
                values = tl.load(
                    inputs + column[:, None], mask=(column < k)[:, None] & in_m[None, :], other=0
                )
                code = _halves(packed, zero[:, None], BITS * (g * TOGETHER + p), BITS)
                partial = tl.dot(code, values, partial)
            total += partial * scale[:, None]
    where = tokens.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(y + where, total.to(tl.float16), mask=in_n[:, None] & in_m[None, :])


@triton.jit
def int8_product(
    x, codes, scales, y, m, n, k,
    ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same product with a byte a weight and a scale a row."""
    tokens, columns = _tile(m, n, BLOCK_M, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_n, in_m = columns < n, tokens < m
    weight = codes + columns.to(tl.int64)[:, None] * k
    inputs = x + tokens.to(tl.int64)[None, :] * k
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, k, BLOCK_K):
        column = first + lane
        in_k = column < k
        code = tl.load(weight + column[None, :], mask=in_n[:, None] & in_k[None, :], other=0)
        values = tl.load(inputs + column[:, None], mask=in_k[:, None] & in_m[None, :], other=0)
        total = tl.dot(_halves(code, ZERO, 0, 8), values, total)
    scale = tl.load(scales + columns, mask=in_n, other=0).to(tl.float32)
    where = tokens.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(y + where, (total * scale[:, None]).to(tl.float16), mask=in_n[:, None] & in_m[None, :])
