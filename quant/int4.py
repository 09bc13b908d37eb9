"""int4 by round-to-nearest in groups of columns, and two codes to a byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.floats import refuse_non_finite
from cpm_edge.quant.formats import Quantized, Scheme, WeightFormat
from cpm_edge.quant.scales import Floats, grouped, half_scales

Bytes = npt.NDArray[np.uint8]

ZERO = 8
"""Zero point of symmetric int4: code 8 is weight 0."""

NARROWER = 0.915
"""The second scale tried, relative to the first. On SmolLM2 it wins in about half of the groups and takes
10 % (symmetric) to 25 % (asymmetric) off the squared error; factors from 0.89 to 0.93 do about as well."""

TILE_ELEMENTS = 64 << 10


def quantize_int4(weight: Floats, group_size: int, symmetric: bool) -> Quantized:
    """Round a block of rows to int4; each row depends on itself alone.

    Symmetric: scale = -w/8 where w is the weight of largest magnitude with its sign, so w gets code 0
    exactly and only a weight of the opposite sign above 7/8 of it is cut off (by at most one step). On
    magnitudes that tie, the negative one counts. Asymmetric: the range from the smallest to the largest
    weight, stretched to include 0, in 15 steps. Scales are rounded to float16 before the codes are
    chosen; see half_scales for very small ones.

    Each group is rounded with that scale and with a smaller one that cuts its outermost weights off and
    resolves the others better (NARROWER); the smaller squared error wins.

    Args:
        weight: float32 (rows, cols).
        group_size: neighbouring columns that share a scale; it divides cols.
        symmetric: fixed zero point 8, or one of 0..15 per group.

    Raises:
        QuantError: NaN or infinity, a scale beyond float16, wrong dtype, shape or group size.
    """
    grouped(weight, group_size)  # checks type, shape and group size
    low, high = _extremes(weight, group_size)
    occupied = (low != 0) | (high != 0)
    if symmetric:
        ideal, lowest = np.where(high > -low, high, low) * np.float32(-0.125), None
    else:
        lowest, high = np.minimum(low, 0), np.maximum(high, 0)
        # Dividing first keeps a range of two float32 extremes from overflowing before it can be named.
        ideal = high / np.float32(15) - lowest / np.float32(15)
    wide = half_scales(ideal, occupied)
    narrow = half_scales(ideal * np.float32(NARROWER), occupied)
    grids = [_grid(wide, lowest, 1.0), _grid(narrow, lowest, NARROWER)]
    codes = np.empty(weight.shape, np.uint8)
    second = np.empty(wide.shape, np.bool_)
    for rows, columns in _tiles(weight, group_size):
        tile, better = _closest(columns, [(s[rows].ravel(), z[rows].ravel()) for s, z in grids])
        codes[rows] = tile.T.reshape(codes[rows].shape)
        second[rows] = better.reshape(second[rows].shape)
    (wide, wide_zeros), (narrow, narrow_zeros) = grids
    scales = np.where(second, narrow, wide)
    zeros = None if symmetric else np.where(second, narrow_zeros, wide_zeros).astype(np.uint8)
    return Quantized(codes, scales, zeros, Scheme(WeightFormat.INT4, group_size, symmetric))


def _tiles(weight: Floats, group_size: int) -> Iterator[tuple[slice, Floats]]:
    """Row ranges with their groups as columns (group_size, groups of all rows).

    Groups are short: numpy is fast only when it runs along many of them, and when a tile stays in cache.
    """
    step = max(TILE_ELEMENTS // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield rows, np.ascontiguousarray(weight[rows].reshape(-1, group_size).T)


def _extremes(weight: Floats, group_size: int) -> tuple[Floats, Floats]:
    """Smallest and largest weight of each group, both (rows, groups), and no NaN or infinity."""
    shape = (weight.shape[0], weight.shape[1] // group_size)
    low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)
    with np.errstate(invalid="ignore"):
        for rows, columns in _tiles(weight, group_size):
            low[rows] = columns.min(axis=0).reshape(low[rows].shape)
            high[rows] = columns.max(axis=0).reshape(high[rows].shape)
    refuse_non_finite((np.isfinite(low) & np.isfinite(high)).all(axis=1))
    return low, high


def _grid(scales: Floats, lowest: Floats | None, narrower: float) -> tuple[Floats, Floats]:
    """Scales and zero points, both float32 (rows, groups)."""
    if lowest is None:
        return scales, np.full(scales.shape, ZERO, np.float32)
    return scales, np.clip(np.rint(lowest * np.float32(-narrower) / scales), 0, 15)


def _closest(columns: Floats, grids: list[tuple[Floats, Floats]]) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Codes uint8 (group_size, groups) with the smaller squared error, and where the second grid has it."""
    results = []
    for scales, zeros in grids:
        rest = columns / scales
        codes = np.rint(rest)
        codes += zeros
        np.clip(codes, 0, 15, out=codes)
        rest += zeros
        rest -= codes
        # A ratio of scales instead of their squares: tiny and huge weights stay in float32's range.
        error = np.einsum("gn,gn->n", rest, rest) * (scales / grids[0][0]) ** 2
        results.append((codes, error))
    (first, first_error), (second, second_error) = results
    better = second_error < first_error
    np.copyto(first, second, where=better)
    return first.astype(np.uint8), better


def pack_int4(codes: Bytes) -> Bytes:
    """Two codes to a byte: (rows, cols) 0..15 to (rows, cols // 2), the even column in the low nibble.

    Raises:
        QuantError: not uint8 (rows, cols), an odd number of columns, or a code above 15.
    """
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise QuantError(f"int4 codes: expected uint8 (rows, cols), got {codes.dtype} {codes.shape}")
    if codes.shape[1] % 2:
        raise QuantError(f"int4 packs two columns into a byte: expected an even count, got {codes.shape[1]}")
    if codes.size and codes.max() > 15:
        raise QuantError(f"int4 codes: expected 0..15, got {codes.max()}")
    packed = codes[:, 1::2] << np.uint8(4)
    packed |= codes[:, 0::2]
    return packed


def unpack_int4(packed: Bytes, cols: int) -> Bytes:
    """The inverse of pack_int4 and pack_zeros_int4: (rows, ceil(cols / 2)) bytes to (rows, cols) codes.

    Raises:
        QuantError: not uint8 (rows, ceil(cols / 2)).
    """
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != (cols + 1) // 2:
        raise QuantError(
            f"packed int4: expected uint8 (rows, {(cols + 1) // 2}) for {cols} columns, "
            f"got {packed.dtype} {packed.shape}"
        )
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=codes[:, 0::2])
    np.right_shift(packed, np.uint8(4), out=codes[:, 1::2])
    return codes[:, :cols]


def pack_zeros_int4(zeros: Bytes) -> Bytes:
    """Zero points (rows, groups) 0..15 to (rows, ceil(groups / 2)), low nibble first.

    Every row starts a byte; the nibble that an odd count leaves over is 0. This is the order of
    ``zero_points`` in com.microsoft MatMulNBits.

    Raises:
        QuantError: as pack_int4.
    """
    if zeros.ndim == 2 and zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return pack_int4(zeros)
