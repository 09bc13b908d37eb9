"""GGUF blocks whose integers have an equal in a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from cpm_edge.exporter.checkpoint.integers import Order
from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.quant import QuantError, Quantized, Scheme
from cpm_edge.quant.gguf_blocks import (
    ASYMMETRIC_INT4,
    INT8,
    SYMMETRIC_INT4,
    unpack_q4_0,
    unpack_q4_1,
    unpack_q8_0,
)

Bytes = npt.NDArray[np.uint8]
Unpack = Callable[[Bytes], Quantized | None]

# TQ1_0 and TQ2_0 are not here: ternary weights are recognized by their values, wherever they come from.
UNPACKED_INTEGERS: dict[GGMLQuantizationType, tuple[Scheme, Unpack]] = {
    GGMLQuantizationType.Q4_0: (SYMMETRIC_INT4, unpack_q4_0),
    GGMLQuantizationType.Q4_1: (ASYMMETRIC_INT4, unpack_q4_1),
    GGMLQuantizationType.Q8_0: (INT8, unpack_q8_0),
}
STEP = 64  # rows looked at together


@dataclass(frozen=True)
class BlockIntegers:
    """The integers of one matrix (see ``Integers``).

    Args:
        scheme: of the blocks.
        read: the stored bytes of rows [start, stop).
        unpack: their integers.
    """

    scheme: Scheme
    read: Callable[[int, int], Bytes]
    unpack: Unpack
    column_order: Order | None = None

    def block(self, start: int, stop: int) -> Callable[[], Quantized]:
        rows = self.read(start, stop)

        def unpack() -> Quantized:
            quantized = self.unpack(rows)
            assert quantized is not None
            return quantized

        return unpack


def find_integers(
    name: str, kind: GGMLQuantizationType, rows: int, read: Callable[[int, int], Bytes]
) -> BlockIntegers | None:
    """The integers of a matrix; None for Q4_1 with a minimum that no zero point expresses.

    Args:
        name: of the matrix, for messages.
        kind: one of UNPACKED_INTEGERS.
        rows: of the matrix.
        read: as in ``BlockIntegers``; for Q4_1 the matrix is read up to the first such minimum.

    Raises:
        CheckpointError: a scale is NaN or infinite.
    """
    scheme, unpack = UNPACKED_INTEGERS[kind]
    if kind is GGMLQuantizationType.Q4_1:
        for start in range(0, rows, STEP):
            try:
                if unpack(read(start, min(start + STEP, rows))) is None:
                    return None
            except QuantError as error:
                row = "" if error.row is None else f" row {start + error.row}"
                raise CheckpointError(f"tensor {name}:{row} {error.text}", hint=error.hint) from error
    return BlockIntegers(scheme, read, unpack)
