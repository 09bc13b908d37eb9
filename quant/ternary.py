"""Ternary weights, taken as they are: -s, 0 and s with one s a group become codes 0, 1 and 2.

Ternary models are published as floats that were quantized in training ("fake-quantized"). Nothing is rounded
here: the groups are read off the bits of the weights, and a matrix that is not ternary is refused.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.floats import refuse_non_finite
from cpm_edge.quant.formats import Quantized, Scheme, WeightFormat
from cpm_edge.quant.int4 import ZERO as INT4_ZERO
from cpm_edge.quant.int4 import Bytes
from cpm_edge.quant.scales import ZERO_GROUP_SCALE, Floats, grouped, half_exact

Bits = npt.NDArray[np.uint32]

TERNARY_GROUPS = (256, 128, 64, 32)
"""Group sizes that are tried, after the whole row."""

ZERO = 1
"""Zero point of ternary codes: code 1 is weight 0."""

_UNFILLED = "ternary packs 4 columns into a byte: expected a multiple of 4 columns, got {}"
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_NO_MAGNITUDE = np.uint32(0xFFFFFFFF)


class TernaryGroups(NamedTuple):
    """What a block of rows allows.

    Attributes:
        width: columns of the largest group that fits every row; all columns when a row has one scale.
        half: float16 holds every scale exactly.
    """

    width: int
    half: bool


def candidates(cols: int) -> list[int]:
    """Group widths that rows of ``cols`` columns may have, largest first: the row, then TERNARY_GROUPS."""
    return [cols, *(size for size in TERNARY_GROUPS if size < cols and cols % size == 0)]


def find_ternary(weight: Floats) -> TernaryGroups:
    """The largest groups in which every row of a block is ternary.

    The groups of a tensor are the narrowest of its blocks, since each width divides the ones before it: a
    block that is ternary in some groups is so in all smaller ones.

    Args:
        weight: float32 (rows, cols), converted exactly from whatever the checkpoint holds.

    Raises:
        QuantError: a group of the smallest width holds two magnitudes beside zero, with the row; columns that
            do not fill bytes.
    """
    if weight.shape[1] % 4:
        raise QuantError(
            _UNFILLED.format(weight.shape[1]),
            hint="--weight-format int8 has one scale per row and takes any number of columns",
        )
    widths = candidates(weight.shape[1])
    peaks = _magnitudes(grouped(weight, widths[-1]))
    half = bool(half_exact(peaks.view(np.float32)).all())
    for width in widths:
        if _agree(peaks.reshape(len(peaks), -1, width // widths[-1])):
            return TernaryGroups(width, half)
    raise AssertionError("a group agrees with itself")


def is_ternary(row: Floats) -> bool | None:
    """Whether one row (cols,) is ternary in groups of any width; None for zeros, which say nothing."""
    if not row.any():
        return None
    try:
        find_ternary(row.reshape(1, -1))
    except QuantError:
        return False
    return True


def quantize_ternary(weight: Floats, group_size: int | None = None, wide_scales: bool = False) -> Quantized:
    """The codes and exact scales of a block of rows; ``dequantize`` gives the same weights back.

    A group of zeros gets ZERO_GROUP_SCALE. The sign of a zero is not kept.

    Args:
        weight: float32 (rows, cols).
        group_size: neighbouring columns that share a scale; None is the whole row.
        wide_scales: allow scales that float16 does not hold exactly.

    Raises:
        QuantError: a group holds two magnitudes beside zero, or a scale needs float32, with the row; wrong
            dtype, shape or group size.
    """
    width = group_size if group_size is not None else int(weight.shape[-1])
    scheme = Scheme(WeightFormat.TERNARY, group_size, wide_scales=wide_scales)
    peaks = _magnitudes(grouped(weight, width)).view(np.float32)
    if not wide_scales and not (half := half_exact(peaks)).all():
        row, group = (int(index) for index in np.argwhere(~half)[0])
        raise QuantError(f"has the scale {peaks[row, group]:.9g}, which float16 does not hold", row=row)
    codes = (weight > 0).view(np.uint8) + np.uint8(ZERO)
    codes -= (weight < 0).view(np.uint8)
    return Quantized(codes, np.where(peaks == 0, ZERO_GROUP_SCALE, peaks), None, scheme)


def ternary_as_int4(q: Quantized) -> Quantized:
    """The same weights in symmetric int4, for layouts that have no two bits: codes 7, 8 and 9.

    Raises:
        QuantError: not ternary.
    """
    if q.scheme.format is not WeightFormat.TERNARY:
        raise QuantError(f"expected ternary codes, got {q.scheme.describe()}")
    scheme = Scheme(WeightFormat.INT4, q.scheme.group_size)
    return Quantized(q.codes + np.uint8(INT4_ZERO - ZERO), q.scales, None, scheme)


def pack_ternary(codes: Bytes) -> Bytes:
    """Four codes to a byte: (rows, cols) 0..3 to (rows, cols // 4), the first column in the lowest bits.

    Raises:
        QuantError: not uint8 (rows, cols), columns that do not fill bytes, or a code above 3.
    """
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise QuantError(f"ternary codes: expected uint8 (rows, cols), got {codes.dtype} {codes.shape}")
    if codes.shape[1] % 4:
        raise QuantError(_UNFILLED.format(codes.shape[1]))
    if codes.size and codes.max() > 3:
        raise QuantError(f"ternary codes: expected 0..3, got {codes.max()}")
    packed = codes[:, 0::4].copy()
    for place in (1, 2, 3):
        packed |= codes[:, place::4] << np.uint8(2 * place)
    return packed


def unpack_ternary(packed: Bytes) -> Bytes:
    """The inverse of pack_ternary: (rows, bytes) to (rows, 4 * bytes) codes 0..3."""
    places = np.arange(0, 8, 2, dtype=np.uint8)
    return ((packed[:, :, None] >> places) & np.uint8(3)).reshape(len(packed), 4 * packed.shape[1])


def _magnitudes(groups: Floats) -> Bits:
    """The bits of each group's one magnitude, (rows, groups); 0 where all weights are 0.

    Raises:
        QuantError: two magnitudes in a group, NaN or infinity, with the row.
    """
    bits: Bits = groups.view(np.uint32) & _MAGNITUDE
    peaks: Bits = bits.max(axis=2)
    refuse_non_finite(peaks.max(axis=1) < _INFINITY)
    fits = bits == peaks[:, :, None]
    fits |= bits == 0
    whole = fits.all(axis=2)
    if not whole.all():
        row, group = (int(index) for index in np.argwhere(~whole)[0])
        raise _not_ternary(groups[row, group], row, group)
    return peaks


def _agree(peaks: Bits) -> bool:
    """Whether the magnitudes (rows, groups, parts) of each group are one, zeros aside."""
    smallest = np.where(peaks == 0, _NO_MAGNITUDE, peaks).min(axis=2)
    largest = peaks.max(axis=2)
    return bool(((smallest == largest) | (largest == 0)).all())


def _not_ternary(group: Floats, row: int, index: int) -> QuantError:
    found = np.unique(np.abs(group[group != 0]))
    shown = ", ".join(f"{value:.9g}" for value in found[:4])
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    first = index * len(group)
    return QuantError(
        f"is not ternary: columns {first} to {first + len(group) - 1} hold the magnitudes {shown}{more}, "
        "expected one beside zero",
        hint="--weight-format int4 rounds the weights instead",
        row=row,
    )
