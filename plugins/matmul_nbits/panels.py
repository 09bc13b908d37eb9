"""Packed panels in numpy, fast enough for whole models: what the exporter writes and the kernels read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.matmul_nbits.spec import PANEL_ROWS, NBitsShape

Bytes = npt.NDArray[np.uint8]


def pack_rows(
    shape: NBitsShape, codes: Bytes, scales: npt.NDArray[np.floating], zeros: Bytes | None
) -> Bytes:
    """The panels of a block of rows, uint8 (panels, panel bytes); blocks of whole panels concatenate.

    Args:
        shape: of the block; ``rows`` may leave the last panel incomplete.
        codes: (rows, cols) 0..2^bits-1.
        scales: (rows, groups), exact in float16; zeros likewise or None.
    """
    codes = _filled(codes, shape.panels * PANEL_ROWS, shape.padded_cols, shape.zero)
    steps = 8 // shape.bits
    vectors = shape.group_cols // (4 * steps)
    quads = codes.reshape(shape.panels, PANEL_ROWS, shape.groups, vectors, steps, 4)
    packed = quads[..., 0, :].copy()
    for step in range(1, steps):
        packed |= quads[..., step, :] << np.uint8(shape.bits * step)
    packed = packed.transpose(0, 2, 3, 1, 4).reshape(shape.panels, shape.groups, -1)
    parts = [_per_group(shape, scales.astype(np.float16), 0), packed]
    if zeros is not None:
        parts.insert(1, _per_group(shape, zeros, shape.zero))
    return np.concatenate(parts, axis=2).reshape(shape.panels, -1)


def _filled(values: npt.NDArray[np.uint8], rows: int, cols: int, value: int) -> Bytes:
    if values.shape == (rows, cols):
        return values
    filled = np.full((rows, cols), value, values.dtype)
    filled[: values.shape[0], : values.shape[1]] = values
    return filled


def _per_group(shape: NBitsShape, values: npt.NDArray[np.generic], value: int) -> Bytes:
    """(rows, groups) of scales or zeros as bytes (panels, groups, bytes of 8 rows)."""
    filled = np.full((shape.panels * PANEL_ROWS, shape.groups), value, values.dtype)
    filled[: len(values)] = values
    ordered = filled.reshape(shape.panels, PANEL_ROWS, shape.groups).transpose(0, 2, 1)
    return np.ascontiguousarray(ordered).view(np.uint8)
