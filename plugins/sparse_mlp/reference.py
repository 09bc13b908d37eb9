"""Numpy statement of the sparse MLP and of its layouts, code by code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.matmul_nbits.reference import restored_activations
from cpm_edge.plugins.matmul_nbits.spec import BLOCK, NBitsShape
from cpm_edge.plugins.sparse_mlp.spec import CHUNK_ROWS, SLICE_ROWS, slice_count

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


def strips(shape: NBitsShape, codes: Bytes, scales: Halves, zeros: Bytes | None) -> Bytes:
    """(rows, strip bytes): byte 4 v + i of a row has columns 4 (s v + j) + i in its bits from j * bits on."""
    steps, rows = 8 // shape.bits, []
    for row in range(shape.rows):
        packed = bytearray(shape.padded_cols * shape.bits // 8)
        for column in range(shape.padded_cols):
            code = int(codes[row, column]) if column < shape.cols else shape.zero
            word, step = divmod(column // 4, steps)
            packed[4 * word + column % 4] |= code << (shape.bits * step)
        packed += scales[row].tobytes() + (b"" if zeros is None else zeros[row].tobytes())
        rows.append(np.frombuffer(bytes(packed), np.uint8))
    return np.stack(rows)


def slices(shape: NBitsShape, codes: Bytes, scales: Halves, zeros: Bytes | None) -> Bytes:
    """(slices, slice bytes); see csrc/kernels/sparse_mlp.h."""
    made = []
    for first in range(0, slice_count(shape) * SLICE_ROWS, SLICE_ROWS):
        rows = range(first, first + SLICE_ROWS)
        packed = bytearray()
        for group in range(shape.groups):
            own = [scales[row, group] if row < shape.rows else np.float16(0) for row in rows]
            packed += np.array(own, np.float16).tobytes()
            if zeros is not None:
                packed += bytes(int(zeros[r, group]) if r < shape.rows else shape.zero for r in rows)
            for column in range(group * shape.group_cols, (group + 1) * shape.group_cols):
                packed += _column(shape, codes, rows, column)
        made.append(np.frombuffer(bytes(packed), np.uint8))
    return np.stack(made)


def _column(shape: NBitsShape, codes: Bytes, rows: range, column: int) -> bytes:
    size = CHUNK_ROWS * shape.bits // 8
    packed = bytearray(len(rows) * shape.bits // 8)
    for place, row in enumerate(rows):
        known = row < shape.rows and column < shape.cols
        code = int(codes[row, column]) if known else shape.zero
        chunk, at = divmod(place, CHUNK_ROWS)
        packed[chunk * size + at % size] |= code << (shape.bits * (at // size))
    return bytes(packed)


def sparse_mlp(
    x: Floats, gate: Floats, up: Floats, down: Floats, threshold: float, block: int = BLOCK
) -> npt.NDArray[np.float64]:
    """W_down (g * W_up x) for x (m, H) and dequantized weights, with the kernels' int8 activations.

    ``block`` columns of activations share a scale.
    """
    seen = restored_activations(x, block)
    gates = (seen @ gate.T.astype(np.float64)).astype(np.float32)
    inner = np.where(gates > np.float32(threshold), gates * (seen @ up.T.astype(np.float64)), 0)
    return np.asarray(restored_activations(inner.astype(np.float32), block) @ down.T.astype(np.float64))
