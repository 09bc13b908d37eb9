"""``cpm.MatMulNBits`` on NVIDIA GPUs: float16 activations, weights of 8, 4 or 2 bits, float32 sums.

Weights lie as ``spans.py`` says. A product sums code - zero, small integers that float16 holds exactly,
within a group, and meets the scale in float32: the weights are never rounded to a scaled float16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half_code(packed, shift: tl.constexpr, BITS: tl.constexpr):
    """1024 + code as float16: the ten bits after the point of 0x6400, which is 1024, count ones.

    No conversion of integers, which runs at a fraction of the rate of other instructions.
    """
    code = (packed.to(tl.int32) >> shift) & ((1 << BITS) - 1)
    return (code | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _float_code(packed, shift: tl.constexpr, BITS: tl.constexpr):
    """2^23 + code as float32, in the same way."""
    code = (packed.to(tl.int32) >> shift) & ((1 << BITS) - 1)
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def nbits_gemv(
    x, codes, scales, zeros, y, m, n, k, row_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """y (m, n) = x (m, k) . weight^T, one row of x a program: for the few rows of a decode step.

    Args:
        row_bytes: of a row of codes; zeros is None for the constant zero point ZERO.
        BLOCK_N, SPANS: rows and spans of a tile.
    """
    PARTS: tl.constexpr = 8 // BITS
    PART: tl.constexpr = SPAN // PARTS
    # Parts that lie in one group: all of them, unless groups are narrower than a span.
    TOGETHER: tl.constexpr = GROUP // PART
    # Programs beside each other read the same weights, so that those of m rows come from memory once.
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += tl.program_id(0).to(tl.int64) * k
    y += tl.program_id(0).to(tl.int64) * n
    lane = tl.arange(0, PART)
    in_rows = rows < n
    row_start = codes + rows.to(tl.int64)[:, None, None] * row_bytes
    total = tl.zeros((BLOCK_N, SPANS), tl.float32)
    for first in range(0, row_bytes // PART, SPANS):
        spans = first + tl.arange(0, SPANS)
        in_spans = spans < row_bytes // PART
        where = spans[:, None] * PART + lane[None, :]
        tile_mask = in_rows[:, None, None] & in_spans[None, :, None]
        packed = tl.load(row_start + where[None, :, :], mask=tile_mask, other=0)
        scale_mask = in_rows[:, None] & in_spans[None, :]
        for g in tl.static_range(PARTS // TOGETHER):
            group = spans * (SPAN // GROUP) + g
            at = group[None, :] * n + rows[:, None]
            scale = tl.load(scales + at, mask=scale_mask, other=0).to(tl.float32)
            if zeros is None:
                zero = tl.full((BLOCK_N, SPANS), 8388608 + ZERO, tl.float32)
            else:
                zero = tl.load(zeros + at, mask=scale_mask, other=0).to(tl.float32) + 8388608
            partial = tl.zeros((BLOCK_N, SPANS, PART), tl.float32)
            for p in tl.static_range(TOGETHER):
                part = g * TOGETHER + p
                column = spans[:, None] * SPAN + part * PART + lane[None, :]
                values = tl.load(x + column, mask=column < k, other=0).to(tl.float32)
                code = _float_code(packed, BITS * part, BITS)
                partial += (code - zero[:, :, None]) * values[None, :, :]
            total += tl.sum(partial, 2) * scale
    tl.store(y + rows, tl.sum(total, 1).to(tl.float16), mask=in_rows)


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
def nbits_gemm(
    x, codes, scales, zeros, y, m, n, k, row_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same product in tiles of BLOCK_M x BLOCK_N on tensor cores: for a chunk of a prompt."""
    PARTS: tl.constexpr = 8 // BITS
    PART: tl.constexpr = SPAN // PARTS
    TOGETHER: tl.constexpr = GROUP // PART
    tokens, columns = _tile(m, n, BLOCK_M, BLOCK_N)
    lane = tl.arange(0, PART)
    in_n, in_m = columns < n, tokens < m
    weight = codes + columns.to(tl.int64)[:, None] * row_bytes + lane[None, :]
    inputs = x + tokens.to(tl.int64)[None, :] * k
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for span in range(row_bytes // PART):
        packed = tl.load(weight + span * PART, mask=in_n[:, None], other=0)
        for g in tl.static_range(PARTS // TOGETHER):
            at = (span * (SPAN // GROUP) + g) * n + columns
            scale = tl.load(scales + at, mask=in_n, other=0).to(tl.float32)
            if zeros is None:
                zero = tl.full((BLOCK_N,), 1024 + ZERO, tl.float16)
            else:
                zero = tl.load(zeros + at, mask=in_n, other=0).to(tl.float16) + 1024
            partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for p in tl.static_range(TOGETHER):
                part = g * TOGETHER + p
                column = span * SPAN + part * PART + lane
                values = tl.load(
                    inputs + column[:, None], mask=(column < k)[:, None] & in_m[None, :], other=0
                )
                code = _half_code(packed, BITS * part, BITS)
                partial = tl.dot(code - zero[:, None], values, partial)
            total += partial * scale[:, None]
    where = tokens.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(y + where, total.to(tl.float16), mask=in_n[:, None] & in_m[None, :])


@triton.jit
def int8_gemv(
    x, codes, scales, y, m, n, k, ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """y (m, n) = x (m, k) . weight^T with a byte a weight and a scale a row, one row of x a program."""
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += tl.program_id(0).to(tl.int64) * k
    y += tl.program_id(0).to(tl.int64) * n
    in_rows = rows < n
    row_start = codes + rows.to(tl.int64)[:, None] * k
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, k, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        in_k = column < k
        code = tl.load(row_start + column[None, :], mask=in_rows[:, None] & in_k[None, :], other=0)
        values = tl.load(x + column, mask=in_k, other=0).to(tl.float32)
        total += (_float_code(code, 0, 8) - (8388608 + ZERO)) * values[None, :]
    scale = tl.load(scales + rows, mask=in_rows, other=0).to(tl.float32)
    tl.store(y + rows, (tl.sum(total, 1) * scale).to(tl.float16), mask=in_rows)


@triton.jit
def int8_gemm(
    x, codes, scales, y, m, n, k,
    ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same product in tiles of BLOCK_M x BLOCK_N on tensor cores."""
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
        total = tl.dot(_half_code(code, 0, 8) - (1024 + ZERO), values, total)
    scale = tl.load(scales + columns, mask=in_n, other=0).to(tl.float32)
    where = tokens.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(y + where, (total * scale[:, None]).to(tl.float16), mask=in_n[:, None] & in_m[None, :])
