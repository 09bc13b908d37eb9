"""Numpy statement of ``cpm.MatMulNBits``: its panels byte by byte, and the product of the kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.matmul_nbits.spec import BLOCK, PANEL_ROWS, SMALLEST_PEAK, NBitsShape

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def dequantize(
    shape: NBitsShape, codes: Bytes, scales: npt.NDArray[np.float16], zeros: Bytes | None
) -> Floats:
    """float32 (rows, cols) from codes (rows, cols), scales and zeros (rows, groups)."""
    width = shape.group_cols
    zero: npt.NDArray[np.float32] | int = shape.zero
    if zeros is not None:
        zero = np.repeat(zeros.astype(np.float32), width, 1)[:, : shape.cols]
    scale = np.repeat(scales.astype(np.float32), width, 1)[:, : shape.cols]
    return (codes.astype(np.float32) - zero) * scale


def pack(shape: NBitsShape, codes: Bytes, scales: npt.NDArray[np.float16], zeros: Bytes | None) -> Bytes:
    """The panels, (panels, panel bytes)."""
    rows = shape.panels * PANEL_ROWS
    padded = np.full((rows, shape.padded_cols), shape.zero, np.uint8)
    padded[: shape.rows, : shape.cols] = codes
    all_scales = np.zeros((rows, shape.groups), np.float16)
    all_scales[: shape.rows] = scales
    all_zeros = np.full((rows, shape.groups), shape.zero, np.uint8)
    if zeros is not None:
        all_zeros[: shape.rows] = zeros
    blocks = _blocks(shape, padded)  # (panels, groups, bytes of a group's codes)
    panels = []
    for panel in range(shape.panels):
        mine = slice(panel * PANEL_ROWS, (panel + 1) * PANEL_ROWS)
        parts = []
        for group in range(shape.groups):
            parts.append(all_scales[mine, group].copy().view(np.uint8))
            if zeros is not None:
                parts.append(all_zeros[mine, group])
            parts.append(blocks[panel, group])
        panels.append(np.concatenate(parts))
    return np.stack(panels)


def _blocks(shape: NBitsShape, codes: Bytes) -> Bytes:
    steps = 8 // shape.bits
    vectors = shape.group_cols // (4 * steps)
    # (panels, 8 rows, groups, vectors, steps, 4) to (panels, groups, vectors, 8 rows, 4), steps into bits.
    split = codes.reshape(shape.panels, PANEL_ROWS, shape.groups, vectors, steps, 4)
    ordered = split.transpose(0, 2, 3, 1, 5, 4)
    packed = np.zeros(ordered.shape[:-1], np.uint8)
    for step in range(steps):
        packed |= ordered[..., step] << np.uint8(shape.bits * step)
    return packed.reshape(shape.panels, shape.groups, -1)


def quantize_activations(
    x: Floats, block: int = BLOCK
) -> tuple[npt.NDArray[np.int8], Floats, npt.NDArray[np.int32]]:
    """int8 codes (m, padded cols), scales and code sums (m, blocks) of activations (m, cols)."""
    m, cols = x.shape
    padded = np.zeros((m, -(-cols // block) * block), np.float32)
    padded[:, :cols] = x
    blocks = padded.reshape(m, -1, block)
    peak = np.abs(blocks).max(2)
    counts = peak > SMALLEST_PEAK
    inverse = np.where(counts, np.float32(127) / np.where(counts, peak, np.float32(1)), np.float32(0))
    codes = np.rint(blocks * inverse[:, :, None]).astype(np.int8)
    return codes.reshape(m, -1), peak / np.float32(127), codes.sum(2, dtype=np.int32)


def restored_activations(x: Floats, block: int = BLOCK) -> npt.NDArray[np.float64]:
    """What is left of activations (m, cols) after ``quantize_activations``."""
    codes, scales, _ = quantize_activations(x, block)
    blocks = codes.reshape(*scales.shape, block).astype(np.float64) * scales[:, :, None]
    return blocks.reshape(len(x), -1)[:, : x.shape[1]]


def matmul(
    shape: NBitsShape, codes: Bytes, scales: npt.NDArray[np.float16], zeros: Bytes | None, x: Floats
) -> npt.NDArray[np.float64]:
    """The product with quantized activations in float64: what float32 kernels may round from."""
    restored = restored_activations(x, shape.activation_block)
    return restored @ dequantize(shape, codes, scales, zeros).astype(np.float64).T
