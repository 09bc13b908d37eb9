"""int4 by round-to-nearest in groups of columns, and two codes to a byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.formats import Quantized, Scheme, WeightFormat
from cpm_edge.quant.scales import Floats, extremes, grouped, half_exact, half_scales, to_codes

Bytes = npt.NDArray[np.uint8]

ZERO = 8
"""Zero point of symmetric int4: code 8 is weight 0."""


def quantize_int4(weight: Floats, group_size: int, symmetric: bool) -> Quantized:
    """Round a block of rows to int4; each row depends on itself alone.

    Symmetric: scale = -w/8 where w is the weight of largest magnitude with its sign, so w gets code 0
    exactly and only a weight of the opposite sign above 7/8 of it is cut off (by at most one step). On
    magnitudes that tie, the negative one counts. A group of -s, 0 and s alone is kept exactly, with scale s
    and codes 7, 8 and 9, where float16 holds s. Asymmetric: the range from the smallest to the largest
    weight, stretched to include 0, in 15 steps. Scales are rounded to float16 before the codes are
    chosen; see half_scales for very small ones.

    Args:
        weight: float32 (rows, cols).
        group_size: neighbouring columns that share a scale; it divides cols.
        symmetric: fixed zero point 8, or one of 0..15 per group.

    Raises:
        QuantError: NaN or infinity, a scale beyond float16, wrong dtype, shape or group size.
    """
    groups = grouped(weight, group_size)
    low, high = extremes(groups)
    occupied = (low != 0) | (high != 0)
    scheme = Scheme(WeightFormat.INT4, group_size, symmetric)
    if symmetric:
        peak = np.where(high > -low, high, low)
        scales = half_scales(peak * np.float32(-0.125), occupied)
        ternary = _ternary_groups(groups, low, high)
        scales[ternary] = high[ternary]
        return Quantized(to_codes(groups, scales, ZERO, (0, 15)), scales, None, scheme)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    # Dividing first keeps a range of two float32 extremes from overflowing before it can be named.
    scales = half_scales(high / np.float32(15) - low / np.float32(15), occupied)
    zeros = np.clip(np.rint(-low / scales), 0, 15).astype(np.uint8)
    return Quantized(to_codes(groups, scales, zeros, (0, 15)), scales, zeros, scheme)


def _ternary_groups(groups: Floats, low: Floats, high: Floats) -> npt.NDArray[np.bool_]:
    """Which groups (rows, groups) hold -s, 0 and s alone, for an s above 0 that float16 holds exactly."""
    # Two extremes of one magnitude are rare in other weights, so little is looked at.
    found: npt.NDArray[np.bool_] = (low == -high) & half_exact(high) & (high > 0)
    rows, columns = np.nonzero(found)
    magnitudes = np.abs(groups[rows, columns])
    found[rows, columns] = ((magnitudes == 0) | (magnitudes == high[rows, columns, None])).all(axis=1)
    return found


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
