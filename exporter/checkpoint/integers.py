"""Integers of a checkpoint on their way to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cpm_edge.quant import Quantized, Scheme

Order = npt.NDArray[np.int64]


class Integers(Protocol):
    """One matrix that a checkpoint stores in integers.

    Attributes:
        scheme: how its blocks are given; groups have a size that bundles have.
        column_order: column ``j`` of the blocks is column ``column_order[j]`` of the matrix; None if all are
            in their places.
    """

    scheme: Scheme
    column_order: Order | None

    def block(self, start: int, stop: int) -> Callable[[], Quantized]:
        """Read rows ``[start, stop)``; the returned function unpacks them, on any thread.

        Raises:
            CheckpointError: a read error.
        """


def dequantized(integers: Integers, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Rows ``[start, stop)`` as float32 in the order of the matrix."""
    weight = integers.block(start, stop)().dequantize()
    if integers.column_order is None:
        return weight
    result = np.empty(weight.shape, np.float32)
    result[:, integers.column_order] = weight
    return result
