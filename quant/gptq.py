"""GPTQ: codes chosen column by column, each column making up for the errors of those before it.

With H + d I = U U^T (U upper) the squared output error of E = W - Q is |E U|^2, whose column k is
E_k U_kk + sum_{j<k} E_j U_jk. So column k is rounded from W_k + sum_{j<k} E_j U_jk / U_kk, which makes
its own term as small as a grid allows. That is GPTQ (Frantar et al., 2022, arXiv:2210.17323) in the form of
LDLQ (Chee et al., 2023, arXiv:2307.13304): the same codes without H's inverse. What they leave over is then
lowered further by ``refine``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.formats import Quantized, WeightFormat
from cpm_edge.quant.hessian import DAMPING, factorise, permute, restore
from cpm_edge.quant.refine import Columns, refine
from cpm_edge.quant.scales import Floats

BLOCK = 64  # columns whose feedback is taken one by one; that of earlier ones is one matrix product
REFINEMENTS = 2  # two more gain a quarter of what the first does, on a random matrix


class Rounded(NamedTuple):
    """The codes of a matrix.

    Attributes:
        matrix: in the scheme of the grid that was given.
        cost: squared output error of each row, float64 (rows,).
        damping: the share that was needed.
    """

    matrix: Quantized
    cost: npt.NDArray[np.float64]
    damping: float


def gptq(
    weight: Floats,
    hessian: Floats,
    grid: Quantized,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
    refinements: int = REFINEMENTS,
) -> Rounded:
    """Codes of a matrix by error feedback on a given grid, then codes and scales by refinement.

    Groups are static: columns keep theirs in any order, so no target needs a gather. Zero points are those of
    ``grid``, and so are scales without refinement.

    Args:
        weight: float32 (rows, cols).
        hessian: float32 (cols, cols), the second moment of the inputs; it is overwritten.
        grid: the matrix in the same scheme, rounded in whatever way; its codes are not looked at.
        act_order: columns with the largest inputs first, while there is much left to make up for them.
        damping: see ``factorise``.
        refinements: how often ``refine`` walks through the matrix.

    Raises:
        QuantError: see ``factorise``.
    """
    rows, cols = weight.shape
    if act_order:
        order = np.argsort(-hessian.diagonal(), kind="stable")
        permute(hessian, order)
    else:
        order = np.arange(cols)
    diagonal = hessian.diagonal().copy()
    damping = factorise(hessian, damping)
    diagonal += np.float32(damping * float(diagonal.mean()))
    columns = Columns(
        errors=np.ascontiguousarray(weight.T[order]),
        codes=np.empty((cols, rows), np.uint8),
        group=order // grid.group_width,
        scales=np.ascontiguousarray(grid.scales.T),
        zeros=np.ascontiguousarray(grid.zero_points().T),
        low=1 if grid.scheme.format is WeightFormat.INT8 else 0,
        high=(1 << grid.scheme.bits) - 1,
    )
    cost = _feed_back(columns, hessian)
    restore(hessian, diagonal)
    for _ in range(refinements):
        cost -= refine(columns, hessian)
    placed = np.empty((rows, cols), np.uint8)
    placed[:, order] = columns.codes.T
    scales = np.ascontiguousarray(columns.scales.T)
    return Rounded(Quantized(placed, scales, grid.zeros, grid.scheme), cost, damping)


def _feed_back(columns: Columns, factor: Floats) -> npt.NDArray[np.float64]:
    """Choose all codes, from the first column to the last; the cost of each row.

    Args:
        columns: whose errors are the weights, and become what is left of them.
        factor: U of the moment, in its upper triangle.
    """
    errors = columns.errors
    cols, rows = errors.shape
    cost = np.zeros(rows, np.float64)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        feedback = factor[:stop, start:stop] / factor.diagonal()[start:stop]
        targets = errors[start:stop].copy()
        if start:
            targets += feedback[:start].T @ errors[:start]
        for k in range(start, stop):
            target = targets[k - start]
            if k > start:
                target += feedback[start:k, k - start] @ errors[start:k]
            scale, zero = columns.scales[columns.group[k]], columns.zeros[columns.group[k]]
            code = np.clip(np.rint(target / scale) + zero, columns.low, columns.high)
            columns.codes[k] = code
            value = (code - zero) * scale
            errors[k] -= value
            cost += ((target - value) * factor[k, k]) ** 2
    return cost
