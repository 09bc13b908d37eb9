"""AWQ: inputs that carry much get finer weights, by scales that cancel in the layer before.

W x = (W diag(s)) (diag(1/s) x): the columns of large inputs are stretched before rounding, and the division
moves into whatever makes the inputs (Lin et al., 2023, arXiv:2306.00978). Here the loss of a candidate is
tr((W - Q) H (W - Q)^T) with the second moment H, so no activations are kept for the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.formats import Quantized
from cpm_edge.quant.hessian import output_power
from cpm_edge.quant.scales import Floats

EXPONENTS = tuple(step / 10 for step in range(1, 11))
SAMPLED_ROWS = 256  # of each matrix: the loss is compared, not reported
LEAST_GAIN = 0.01  # a smaller one is not worth another scale in the layer before

Round = Callable[[Floats], Quantized]


class Reader(NamedTuple):
    """A matrix float32 (rows, cols) and the second moment of its inputs (cols, cols)."""

    weight: Floats
    hessian: Floats


def search_scales(readers: Sequence[Reader], channels: npt.NDArray[np.int64], round_: Round) -> Floats | None:
    """The best factors for what makes the inputs of some matrices.

    Args:
        readers: all matrices that read the inputs.
        channels: for each input (cols,) the channel of the layer before that makes it; several inputs may
            come from one (grouped-query attention).
        round_: rounds a matrix, row by row.

    Returns:
        float32, a factor for each channel, around 1: columns are multiplied by it, the channel is divided.
        Channels that make no input get 1. None where no factors lower the loss.

    Raises:
        QuantError: the readers have other numbers of columns than ``channels``.
    """
    if any(reader.weight.shape[1] != len(channels) for reader in readers):
        raise QuantError(f"expected matrices of {len(channels)} columns")
    power = sum(reader.hessian.diagonal().astype(np.float64) for reader in readers)
    count = int(channels.max()) + 1
    inputs = np.bincount(channels, minlength=count)
    importance = np.sqrt(np.bincount(channels, power, count) / np.maximum(inputs, 1))
    if not importance.any():
        return None
    # A channel that is always zero may get any factor; the smallest of the others keeps it harmless.
    importance = np.maximum(importance, importance[importance > 0].min())
    importance[inputs == 0] = importance.max()  # keeps them out of the extremes
    samples = [Reader(_sample(reader.weight), reader.hessian) for reader in readers]
    best, found = (1 - LEAST_GAIN) * _loss(samples, np.ones(len(channels), np.float32), round_), None
    for exponent in EXPONENTS:
        factors = importance**exponent
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
        factors[inputs == 0] = 1
        try:
            loss = _loss(samples, factors[channels], round_)
        except QuantError:  # a scale beyond float16: too much of a stretch
            continue
        if loss < best:
            best, found = loss, factors
    return found


def _sample(weight: Floats) -> Floats:
    """Rows from all over a matrix."""
    return weight[:: -(-len(weight) // SAMPLED_ROWS)]


def _loss(readers: Sequence[Reader], factors: Floats, round_: Round) -> float:
    """Squared output error of all matrices, rounded under the factors (cols,)."""
    total = 0.0
    for weight, hessian in readers:
        error = weight - round_(weight * factors).dequantize() / factors
        total += float(output_power(error, hessian).sum())
    return total
