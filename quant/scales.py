"""What the integer formats share: groups of columns, their extremes, and scales that float16 holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.floats import FP16_MAX, refuse_non_finite

Floats = npt.NDArray[np.float32]

SMALLEST_SCALE = np.float32(2.0**-24)
"""float16's smallest value above zero. A group too small for it gets it, with small codes or zeros."""

ZERO_GROUP_SCALE = np.float32(2.0**-14)
"""The scale of an all-zero group, whose codes are all the zero point: any scale dequantizes it to 0.
Zero would be refused by engines that want positive scales and divided by in requantizers, so it is
float16's smallest normal value."""


def grouped(weight: Floats, group_size: int) -> Floats:
    """A (rows, cols) matrix seen as (rows, groups, group_size).

    Raises:
        QuantError: not float32 (rows, cols), no columns, or groups that do not divide them.
    """
    if weight.dtype != np.float32 or weight.ndim != 2:
        raise QuantError(f"weight: expected float32 (rows, cols), got {weight.dtype} {weight.shape}")
    rows, cols = weight.shape
    if group_size < 1 or cols == 0 or cols % group_size:
        raise QuantError(
            f"{cols} columns cannot be split into groups of {group_size}",
            hint="fit_group() picks a group size that divides the columns",
        )
    return weight.reshape(rows, cols // group_size, group_size)


def extremes(groups: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest weight of each group, both (rows, groups).

    Raises:
        QuantError: NaN or infinity, with the row.
    """
    with np.errstate(invalid="ignore"):
        low, high = groups.min(axis=2), groups.max(axis=2)
    refuse_non_finite((np.isfinite(low) & np.isfinite(high)).all(axis=1))
    return low, high


def half_scales(raw: Floats, occupied: npt.NDArray[np.bool_]) -> Floats:
    """Scales rounded to float16, as float32, sign kept.

    Normal values round to nearest: the outermost weight then moves by at most 2**-11 of itself. Subnormal
    ones round away from zero, because nearest could halve them and cut off the outermost weights.

    Args:
        raw: ideal scales (rows, groups).
        occupied: which groups hold a weight other than zero; the others get ZERO_GROUP_SCALE.

    Raises:
        QuantError: a scale beyond float16's range, with the row.
    """
    ideal = np.copysign(np.maximum(np.abs(raw), SMALLEST_SCALE), raw)
    with np.errstate(over="ignore", under="ignore"):
        half = ideal.astype(np.float16)
        outward = np.nextafter(half, np.copysign(np.float16(np.inf), half))
        scales = half.astype(np.float32)
    short = (np.abs(scales) < ZERO_GROUP_SCALE) & (np.abs(scales) < np.abs(ideal))
    scales = np.where(short, outward.astype(np.float32), scales)
    lost = np.isinf(scales).any(axis=1)
    if lost.any():
        row = int(np.argmax(lost))
        raise QuantError(
            f"needs a scale of {np.abs(raw[row]).max():.6g}, beyond float16's largest value {FP16_MAX:.0f}",
            hint="store this tensor as bf16 or fp32",
            row=row,
        )
    return np.where(occupied, scales, ZERO_GROUP_SCALE)


def half_exact(scales: Floats) -> npt.NDArray[np.bool_]:
    """Which values float16 holds exactly; same shape."""
    with np.errstate(over="ignore", under="ignore"):
        exact: npt.NDArray[np.bool_] = scales.astype(np.float16) == scales
    return exact


def to_codes(
    groups: Floats,
    scales: Floats,
    zeros: npt.NDArray[np.uint8] | int,
    limits: tuple[int, int],
) -> npt.NDArray[np.uint8]:
    """The nearest code of each weight for the scale as stored, uint8 (rows, cols).

    Args:
        groups: weights (rows, groups, group_size).
        scales: (rows, groups), no zeros.
        zeros: zero points (rows, groups), or one for all.
        limits: smallest and largest code.
    """
    codes = groups / scales[:, :, None]
    np.rint(codes, out=codes)
    codes += np.float32(zeros) if isinstance(zeros, int) else zeros[:, :, None]
    np.clip(codes, limits[0], limits[1], out=codes)
    rows, count, width = groups.shape
    return codes.astype(np.uint8).reshape(rows, count * width)
