"""The second moment of a linear layer's inputs, which says what an error of its weights costs.

For inputs x the squared error of the output of W - Q, summed over the calibration tokens, is
tr((W - Q) H (W - Q)^T) with H = sum x x^T. Everything here works in place on one float32 matrix: for the
16,384 inputs of an 8B model's MLP it takes 1 GiB, and a copy would take another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.scales import Floats

STRIPE = 1024  # rows of H that are touched at a time: bounds the temporaries
BLOCK = 256  # columns that are factorised at a time
DAMPING = 0.01  # of the mean of the diagonal; the value of the GPTQ paper
_MOST_DAMPING = 1.0


class Hessian:
    """A sum of outer products of inputs, gathered batch by batch.

    Args:
        cols: inputs of the layer.

    Attributes:
        matrix: float32 (cols, cols); only its upper triangle is right before ``finish``.
        rows: inputs added so far.
    """

    def __init__(self, cols: int) -> None:
        self.matrix: Floats = np.zeros((cols, cols), np.float32)
        self.rows = 0

    def add(self, inputs: Floats) -> None:
        """Add rows of inputs, float32 (rows, cols).

        Raises:
            QuantError: NaN or infinity among them.
        """
        if not np.isfinite(inputs).all():
            raise QuantError(
                "the calibration's activations are not finite",
                hint="the checkpoint computes NaN or infinity on this text; try another --dataset",
            )
        for start in range(0, len(self.matrix), STRIPE):
            stripe = slice(start, start + STRIPE)
            self.matrix[stripe, start:] += inputs[:, stripe].T @ inputs[:, start:]
        self.rows += len(inputs)

    def finish(self) -> Floats:
        """The mean outer product, symmetric; ``add`` may not follow."""
        if self.rows:
            self.matrix /= self.rows
        mirror(self.matrix)
        return self.matrix


def mirror(matrix: Floats) -> None:
    """Copy the upper triangle over the lower one, in place."""
    size = len(matrix)
    for start in range(0, size, STRIPE):
        stripe = slice(start, min(start + STRIPE, size))
        corner = matrix[stripe, stripe]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
        matrix[stripe.stop :, stripe] = matrix[stripe, stripe.stop :].T


def permute(matrix: Floats, order: npt.NDArray[np.int64]) -> None:
    """Put rows and columns of a square matrix into another order, in place."""
    for start in range(0, len(matrix), STRIPE):
        matrix[start : start + STRIPE] = matrix[start : start + STRIPE, order]
    for start in range(0, len(matrix), STRIPE):
        matrix[:, start : start + STRIPE] = matrix[order, start : start + STRIPE]


def rescale(matrix: Floats, factors: Floats) -> None:
    """The second moment of inputs that are multiplied by ``factors`` (cols,), in place."""
    matrix *= factors[:, None]
    matrix *= factors


def output_power(weight: Floats, hessian: Floats) -> npt.NDArray[np.float64]:
    """Mean squared output of each row w of a matrix, w H w^T: float64 (rows,)."""
    result: npt.NDArray[np.float64] = np.einsum("ij,ij->i", weight @ hessian, weight, dtype=np.float64)
    return result


def factorise(hessian: Floats, damping: float = DAMPING) -> float:
    """Overwrite H's upper triangle with U of H + d I = U U^T, d a share of the mean of its diagonal.

    An upper factor from the right is what error feedback wants (see ``gptq``), and no inverse is taken for
    it. Inputs that are always zero, and fewer tokens than inputs, make H singular: d is what then keeps
    it regular, and grows tenfold until the factor exists.

    Args:
        hessian: float32 (n, n), symmetric; below the diagonal it stays as it is.
        damping: the first share to try.

    Returns:
        The share that was needed.

    Raises:
        QuantError: no share up to 1 was enough, or NaN.
    """
    diagonal = hessian.diagonal().copy()
    mean = float(diagonal.mean()) or 1.0
    share = damping
    while True:
        np.fill_diagonal(hessian, diagonal + np.float32(share * mean))
        try:
            _upper_factor(hessian)
            return share
        except np.linalg.LinAlgError:
            if share >= _MOST_DAMPING:
                raise QuantError(
                    "the calibration's activations have no positive second moment",
                    hint="use more or other calibration text",
                ) from None
            share = min(10 * share, _MOST_DAMPING)
            restore(hessian, diagonal)


def restore(hessian: Floats, diagonal: Floats) -> None:
    """H again, in place, after ``factorise``: its upper triangle from the lower one, and the diagonal."""
    mirror(hessian.T)
    np.fill_diagonal(hessian, diagonal)


def _upper_factor(matrix: Floats) -> None:
    """Right-looking, block by block from the last column to the first."""
    size = len(matrix)
    for stop in range(size, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        corner = _small_upper_factor(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = np.triu(corner) + np.tril(matrix[start:stop, start:stop], -1)
        if start == 0:
            return
        # A = P U^T above the corner, so P = A U^-T.
        panel = matrix[:start, start:stop] @ np.linalg.inv(corner).T
        matrix[:start, start:stop] = panel
        for first in range(0, start, STRIPE):
            last = min(first + STRIPE, start)
            product = panel[first:last] @ panel[first:].T
            inner = last - first
            product[:, :inner] = np.triu(product[:, :inner])
            matrix[first:last, first:start] -= product


def _small_upper_factor(block: Floats) -> Floats:
    """U of U U^T for one block, from the lower factor of the block turned around; reads its upper half."""
    turned = block[::-1, ::-1]  # the upper half of the block is the lower half of this one
    lower: Floats = np.linalg.cholesky(turned)
    if not np.isfinite(lower).all():  # which numpy lets pass
        raise np.linalg.LinAlgError
    return lower[::-1, ::-1]
