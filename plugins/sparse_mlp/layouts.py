"""Strips and slices in numpy, fast enough for whole models: what the exporter writes and the kernels read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.sparse_mlp.spec import CHUNK_ROWS, SLICE_ROWS

Bytes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.floating]


def pack_strips(shape: NBitsShape, codes: Bytes, scales: Scales, zeros: Bytes | None) -> Bytes:
    """A block of rows in strips, uint8 (rows, strip bytes); blocks concatenate.

    Args:
        shape: of the block.
        codes: (rows, cols) 0..2^bits-1.
        scales: (rows, groups), exact in float16; zeros likewise or None.
    """
    steps = 8 // shape.bits
    padded = _filled(codes, shape.rows, shape.padded_cols, shape.zero)
    quads = padded.reshape(shape.rows, -1, steps, 4)
    packed = quads[:, :, 0].copy()
    for step in range(1, steps):
        packed |= quads[:, :, step] << np.uint8(shape.bits * step)
    parts = [packed.reshape(shape.rows, -1), np.ascontiguousarray(scales.astype(np.float16)).view(np.uint8)]
    return np.concatenate(parts if zeros is None else [*parts, zeros], axis=1)


def pack_slices(shape: NBitsShape, codes: Bytes, scales: Scales, zeros: Bytes | None) -> Bytes:
    """A block of rows in slices, uint8 (slices, slice bytes); blocks of whole slices concatenate.

    Args:
        shape: of the block; ``rows`` may leave the last slice incomplete. Others as for ``pack_strips``.
    """
    count = -(-shape.rows // SLICE_ROWS)
    padded = _filled(codes, count * SLICE_ROWS, shape.padded_cols, shape.zero)
    columns = padded.reshape(count, SLICE_ROWS, shape.groups, shape.group_cols).transpose(0, 2, 3, 1)
    steps = 8 // shape.bits
    # (slices, groups, columns, chunks, steps, bytes of a chunk)
    split = columns.reshape(*columns.shape[:3], SLICE_ROWS // CHUNK_ROWS, steps, -1)
    packed = split[..., 0, :].copy()
    for step in range(1, steps):
        packed |= split[..., step, :] << np.uint8(shape.bits * step)
    parts = [_per_group(shape, count, scales.astype(np.float16), 0), packed.reshape(count, shape.groups, -1)]
    if zeros is not None:
        parts.insert(1, _per_group(shape, count, zeros, shape.zero))
    return np.concatenate(parts, axis=2).reshape(count, -1)


def _filled(values: Bytes, rows: int, cols: int, value: int) -> Bytes:
    if values.shape == (rows, cols):
        return values
    filled = np.full((rows, cols), value, np.uint8)
    filled[: values.shape[0], : values.shape[1]] = values
    return filled


def _per_group(shape: NBitsShape, count: int, values: npt.NDArray[np.generic], value: int) -> Bytes:
    """(rows, groups) of scales or zeros as bytes (slices, groups, bytes of 128 rows)."""
    filled = np.full((count * SLICE_ROWS, shape.groups), value, values.dtype)
    filled[: len(values)] = values
    ordered = filled.reshape(count, SLICE_ROWS, shape.groups).transpose(0, 2, 1)
    return np.ascontiguousarray(ordered).view(np.uint8)
