"""int8 by round-to-nearest, symmetric, with one scale per row or per group of columns."""

from __future__ import annotations

import numpy as np

from cpm_edge.quant.formats import Quantized, Scheme, WeightFormat
from cpm_edge.quant.scales import Floats, extremes, grouped, half_scales, to_codes

ZERO = 128
"""Zero point of int8 codes as bytes: code 128 is weight 0."""


def quantize_int8(weight: Floats, group_size: int | None = None) -> Quantized:
    """Round a block of rows to int8; each row depends on itself alone.

    scale = largest magnitude / 127, rounded to float16 before the codes are chosen. Codes are q + 128 with
    q in -127..127; -128 is not used, so that negation is exact.

    Args:
        weight: float32 (rows, cols).
        group_size: neighbouring columns that share a scale; None is the whole row.

    Raises:
        QuantError: NaN or infinity, a scale beyond float16, wrong dtype, shape or group size.
    """
    width = group_size if group_size is not None else (weight.shape[1] if weight.ndim == 2 else 1)
    groups = grouped(weight, width)
    low, high = extremes(groups)
    peak: Floats = np.maximum(-low, high)
    scales = half_scales(np.divide(peak, 127, dtype=np.float32), peak != 0)
    codes = to_codes(groups, scales, ZERO, (1, 255))
    return Quantized(codes, scales, None, Scheme(WeightFormat.INT8, group_size))
