"""Codes and scales improved one at a time, after error feedback has chosen them.

The squared output error tr(E H E^T) of E = W - Q is a parabola in every single code and in every scale. Going
through them group by group and taking the best grid point of each can only lower it: coordinate descent, for
codes QuantEase (Behdin et al., 2023, arXiv:2309.01885).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.scales import Floats

ROWS = 4096  # of the matrix, refined together: a group of them stays in the cache


class Columns(NamedTuple):
    """A matrix while it is rounded, turned: a row for each of its columns, in any order. Changed in place.

    Attributes:
        errors: W - Q, float32 (cols, rows).
        codes: uint8 (cols, rows).
        group: of each column, int64 (cols,).
        scales: float32 (groups, rows), values that float16 holds.
        zeros: uint8 (groups, rows).
        low: the least code.
        high: the greatest code.
    """

    errors: Floats
    codes: npt.NDArray[np.uint8]
    group: npt.NDArray[np.int64]
    scales: Floats
    zeros: npt.NDArray[np.uint8]
    low: int
    high: int

    def of_rows(self, rows: slice) -> Columns:
        """Some rows of the matrix; they are not copied."""
        part = (slice(None), rows)
        return self._replace(
            errors=self.errors[part], codes=self.codes[part], scales=self.scales[part], zeros=self.zeros[part]
        )


def refine(columns: Columns, hessian: Floats) -> npt.NDArray[np.float64]:
    """Lower the error of a matrix by one walk through its groups: first all codes of one, then its scale.

    Args:
        columns: the matrix.
        hessian: float32 (cols, cols) in the order of the columns, symmetric, its diagonal above zero.

    Returns:
        How much less each row costs, float64 (rows,).
    """
    rows = columns.errors.shape[1]
    parts = (slice(start, start + ROWS) for start in range(0, rows, ROWS))
    return np.concatenate([_refine_rows(columns.of_rows(part), hessian) for part in parts])


def _refine_rows(columns: Columns, hessian: Floats) -> npt.NDArray[np.float64]:
    gain = np.zeros(columns.errors.shape[1], np.float64)
    for index, scale in enumerate(columns.scales):
        members = np.flatnonzero(columns.group == index)
        moment = hessian[members]
        slope = moment @ columns.errors  # half the derivative of the cost by each error
        moment = np.ascontiguousarray(moment[:, members])
        zero = columns.zeros[index].astype(np.float32)
        steps = columns.codes[members] - zero
        errors = columns.errors[members]
        for k, step in enumerate(steps):
            best = step + slope[k] / (moment[k, k] * scale)
            chosen = np.clip(np.rint(best + zero), columns.low, columns.high) - zero
            change = (step - chosen) * scale
            gain -= change * (2 * slope[k] + change * moment[k, k])
            errors[k] += change
            slope += np.multiply.outer(moment[:, k], change)
            step[:] = chosen
        growth = _growth(scale, slope, steps, moment, gain)
        scale += growth
        columns.errors[members] = errors - steps * growth
        columns.codes[members] = steps + zero
    return gain


def _growth(
    scale: Floats, slope: Floats, steps: Floats, moment: Floats, gain: npt.NDArray[np.float64]
) -> Floats:
    """What to add to the scales of a group (rows,); what that lowers the cost by is added to ``gain``."""
    first = np.einsum("kr,kr->r", slope, steps)
    second = np.einsum("kr,kr->r", moment @ steps, steps)
    # A group of zero codes has no best scale, and a sign that changes would be a code that was missed.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = (scale + first / second).astype(np.float16).astype(np.float32)
        growth = wanted - scale
        won = growth * (2 * first - growth * second)
        pays = np.isfinite(wanted) & (wanted * scale > 0) & (won > 0)
    gain += np.where(pays, won, 0)
    return np.where(pays, growth, np.float32(0))
