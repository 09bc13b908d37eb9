"""int4 weights of quantization-aware training, taken as they are: floats on a grid of 16 steps a group.

Such a checkpoint holds w = round(code * scale) in bfloat16 (or float16): the codes are integers, and what
they were multiplied with is lost but for the interval that rounds to the same floats. Nothing is fitted here:
codes and scale, multiplied and rounded to the type of the weights, must give every one of them bit by bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.floats import refuse_non_finite
from cpm_edge.quant.formats import GROUP_SIZES, Quantized, Scheme, WeightFormat
from cpm_edge.quant.int4 import ZERO
from cpm_edge.quant.scales import ZERO_GROUP_SCALE, Floats, grouped, half_exact

Doubles = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

PEAK_CODES = (7, 8, 6, 5, 4, 3, 2, 1)
"""Magnitudes that the code of a group's largest weight may have: scale = max/7 or max/8 in training, and less
where the scale was learned."""

BITS_OF = {"BF16": 8, "F16": 11, "F32": 24}
"""Significant bits of the types that weights are stored in, by their safetensors names."""


class Grid(NamedTuple):
    """What a block of rows allows.

    Attributes:
        width: columns of the largest group that fits every row.
        half: float16 holds every scale exactly.
    """

    width: int
    half: bool


def find_grid(weight: Floats, bits: int) -> Grid:
    """The largest of GROUP_SIZES in which every row of a block lies on a grid of int4.

    Args:
        weight: float32 (rows, cols), converted exactly from the type that it is stored in.
        bits: significant bits of that type, see BITS_OF.

    Raises:
        QuantError: a group of the smallest size does not, with the row; columns that no size divides; NaN or
            infinity.
    """
    sizes = [size for size in sorted(GROUP_SIZES, reverse=True) if weight.shape[1] % size == 0]
    if not sizes:
        raise QuantError(
            f"{weight.shape[1]} columns are divided by no group size ({GROUP_SIZES[0]} is the smallest)",
            hint="--weight-format int8 has one scale per row and takes any number of columns",
        )
    for size in sizes:
        groups = grouped(weight, size)
        scales, fits = _scales(groups, bits)
        if fits.all():
            return Grid(size, bool(half_exact(scales).all()))
    raise _off_grid(groups, fits)


def on_grid(rows: Floats, bits: int) -> npt.NDArray[np.bool_] | None:
    """Which rows (rows, cols) lie on a grid in groups of some size, (rows,); None if no size divides them.

    Rows of zeros count as lying on one.
    """
    size = next((size for size in sorted(GROUP_SIZES) if rows.shape[1] % size == 0), None)
    if size is None or not np.isfinite(rows).all():
        return None
    _, groups = _scales(grouped(rows, size), bits)
    fits: Mask = np.logical_and.reduce(groups, axis=1)
    return fits


def quantize_grid(weight: Floats, group_size: int, bits: int, wide_scales: bool = False) -> Quantized:
    """The codes and scales of a block of rows, symmetric int4; a group of zeros gets ZERO_GROUP_SCALE.

    Args:
        weight: float32 (rows, cols).
        group_size: neighbouring columns that share a scale.
        bits: significant bits of the type that the weights are stored in.
        wide_scales: allow scales that float16 does not hold exactly.

    Raises:
        QuantError: a group does not lie on a grid, or its scale needs float32, with the row.
    """
    groups = grouped(weight, group_size)
    scales, fits = _scales(groups, bits)
    if not fits.all():
        raise _off_grid(groups, fits)
    if not wide_scales and not (half := half_exact(scales)).all():
        row, group = (int(index) for index in np.argwhere(~half)[0])
        raise QuantError(f"has the scale {scales[row, group]:.9g}, which float16 does not hold", row=row)
    codes = (np.rint(groups / scales[:, :, None]) + np.float32(ZERO)).astype(np.uint8)
    scheme = Scheme(WeightFormat.INT4, group_size, wide_scales=wide_scales)
    return Quantized(codes.reshape(weight.shape), scales, None, scheme)


def _scales(groups: Floats, bits: int) -> tuple[Floats, Mask]:
    """A scale for each group (rows, groups), and which groups it gives back bit by bit."""
    peaks = np.abs(groups).max(axis=2)
    refuse_non_finite(np.logical_and.reduce(np.isfinite(peaks), axis=1))
    scales = np.full(peaks.shape, ZERO_GROUP_SCALE, np.float32)
    fits: Mask = peaks == 0
    for peak_code in PEAK_CODES:
        rows, columns = np.nonzero(~fits)
        if not len(rows):
            break
        found, ok = _fit(groups[rows, columns], peak_code, bits)
        scales[rows[ok], columns[ok]] = found[ok]
        fits[rows[ok], columns[ok]] = True
    return scales, fits


def _fit(groups: Floats, peak_code: int, bits: int) -> tuple[Floats, Mask]:
    """Scales (n,) of groups (n, width) whose largest weight has a code of that magnitude, where one fits."""
    peaks = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1).astype(np.float64)
    # Codes are -8..7: a largest weight of 8 steps is at -8, so that its scale has the other sign.
    guess = np.abs(peaks) / peak_code if peak_code < 8 else -peaks / 8
    codes = np.rint(groups / guess)
    low, high = _interval(groups, codes, bits)
    ok: Mask = (low <= high) & (codes >= -8).all(axis=1) & (codes <= 7).all(axis=1)
    scales = np.zeros(len(groups), np.float32)
    sign = np.sign(guess[:, 0])
    pending = ok.copy()
    for candidate in _candidates(low, high):
        tried = (candidate * sign).astype(np.float32)
        good = pending & _gives_back(groups, codes, tried, bits)
        scales[good] = tried[good]
        pending &= ~good
    return scales, ok & ~pending


def _interval(groups: Floats, codes: Doubles, bits: int) -> tuple[Doubles, Doubles]:
    """Bounds (n,) of the scale's magnitude between which every product rounds to its weight."""
    magnitude, steps = np.abs(groups).astype(np.float64), np.abs(codes)
    fraction, exponent = np.frexp(magnitude)
    above = np.ldexp(0.5, exponent - bits)
    below = np.where(fraction == 0.5, above / 2, above)  # the steps below a power of two are half as wide
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(steps == 0, 0.0, (magnitude - below) / steps).max(axis=1)
        high = np.where(steps == 0, np.inf, (magnitude + above) / steps).min(axis=1)
    # A weight other than zero has no code of zero, whatever the scale.
    high[((steps == 0) & (magnitude > 0)).any(axis=1)] = -1
    return low, high


def _candidates(low: Doubles, high: Doubles) -> list[Doubles]:
    """Scales between two bounds: bfloat16 first, since training often computes them in it, then float16.

    Where float16 has a value between the bounds one of these is exact in it, so that narrower groups, whose
    bounds are wider, never need float32 where wider ones do not.
    """
    middle = (low + high) / 2
    fraction, exponent = np.frexp(middle)
    brain = np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8)
    with np.errstate(over="ignore", under="ignore"):
        half = middle.astype(np.float16).astype(np.float64)
    exact = half_exact(brain.astype(np.float32))
    return [np.where(exact, brain, half), half, brain, middle]


def _gives_back(groups: Floats, codes: Doubles, scales: Floats, bits: int) -> Mask:
    """Which groups (n, width) their codes times a scale (n,) are, rounded to a type of that many bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = codes.astype(np.float32) * scales[:, None]
    fraction, exponent = np.frexp(products.astype(np.float64))
    rounded = np.ldexp(np.rint(np.ldexp(fraction, bits)), exponent - bits)
    equal: Mask = (rounded == groups).all(axis=1)
    return equal


def _off_grid(groups: Floats, fits: Mask) -> QuantError:
    row, group = (int(index) for index in np.argwhere(~fits)[0])
    first = group * groups.shape[2]
    return QuantError(
        f"is not on a grid of int4: columns {first} to {first + groups.shape[2] - 1} are not whole "
        "multiples, -8 to 7, of one scale",
        hint="--weight-format int4 --group-size 32 rounds the weights instead",
        row=row,
    )
