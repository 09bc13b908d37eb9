"""Scales and zero points of int4 groups that cost the outputs least, every group rounded by itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.formats import Quantized, Scheme, WeightFormat
from cpm_edge.quant.int4 import ZERO
from cpm_edge.quant.scales import Floats, extremes, grouped, half_scales, to_codes

SHRINK = tuple(1 - 0.04 * step for step in range(13))  # shares of the range that are tried: 1 to 0.52
ROWS = 4096  # looked at together; bounds the temporaries
HIGHEST = 15


def search_grid(weight: Floats, hessian: Floats, group_size: int, symmetric: bool) -> Quantized:
    """Round a matrix to int4, the range of each group chosen among shrunk ones by its squared output error.

    Clipping a group's largest weights makes the steps of all others finer. Whether that pays is judged by
    (w - q) H_gg (w - q)^T, the error that the group alone would add to the outputs. Symmetric groups may put
    their zero point's spare code on either side.

    Args:
        weight: float32 (rows, cols).
        hessian: float32 (cols, cols), second moment of the inputs.
        group_size: divides cols.
        symmetric: zero point 8, or one a group.

    Raises:
        QuantError: as ``quantize_int4``.
    """
    cols = weight.shape[1]
    starts = range(0, cols, group_size)
    blocks = np.stack([hessian[s : s + group_size, s : s + group_size] for s in starts])
    parts = [
        _search(weight[row : row + ROWS], blocks, group_size, symmetric)
        for row in range(0, len(weight), ROWS)
    ]
    zeros = None if symmetric else np.concatenate([part.zeros for part in parts if part.zeros is not None])
    codes, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return Quantized(codes, scales, zeros, Scheme(WeightFormat.INT4, group_size, symmetric))


def _search(weight: Floats, blocks: Floats, group_size: int, symmetric: bool) -> Quantized:
    groups = grouped(weight, group_size)
    low, high = extremes(groups)
    occupied = (low != 0) | (high != 0)
    best = np.full(low.shape, np.inf, np.float32)
    scales = np.empty(low.shape, np.float32)
    zeros = np.full(low.shape, ZERO, np.uint8)
    for share in SHRINK:
        for scale, zero in _candidates(low, high, occupied, np.float32(share), symmetric):
            codes = to_codes(groups, scale, zero, (0, HIGHEST)).reshape(groups.shape)
            error = groups - (codes - zero[:, :, None].astype(np.float32)) * scale[:, :, None]
            across = error.transpose(1, 0, 2)
            cost = np.einsum("grk,grk->rg", across @ blocks, across)
            better = cost < best
            best[better], scales[better], zeros[better] = cost[better], scale[better], zero[better]
    codes = to_codes(groups, scales, zeros, (0, HIGHEST))
    return Quantized(
        codes, scales, None if symmetric else zeros, Scheme(WeightFormat.INT4, group_size, symmetric)
    )


def _candidates(
    low: Floats, high: Floats, occupied: npt.NDArray[np.bool_], share: np.float32, symmetric: bool
) -> list[tuple[Floats, npt.NDArray[np.uint8]]]:
    """Scales and zero points of all groups for one share of their ranges."""
    if symmetric:
        peak = np.where(high > -low, high, low)
        scale = half_scales(peak * (share / np.float32(-8)), occupied)
        zero = np.full(low.shape, ZERO, np.uint8)
        return [(scale, zero), (-scale, zero)]
    low, high = np.minimum(low, 0) * share, np.maximum(high, 0) * share
    scale = half_scales(high / np.float32(HIGHEST) - low / np.float32(HIGHEST), occupied)
    return [(scale, np.clip(np.rint(-low / scale), 0, HIGHEST).astype(np.uint8))]
