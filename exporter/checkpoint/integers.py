"""Integers of a checkpoint on their way to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cpm_edge.quant import Quantized, Scheme

Order = npt.NDArray[np.int64]


class Integers(Protocol):
    """One matrix that a checkpoint stores in integers."""

    @property
    def scheme(self) -> Scheme:
        """How its blocks are given; groups have a size that bundles have."""

    @property
    def column_order(self) -> Order | None:
        """Column ``j`` of the blocks is this column of the matrix; None if all are in their places."""

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
