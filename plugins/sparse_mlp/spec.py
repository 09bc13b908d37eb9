"""Specification of the sparse MLP (MiniCPM-S), which exists in native graphs only.

    g = W_gate x where that is above a threshold, else 0      FATReLU; with threshold 0 ReLU
    y = residual + scale * W_down (g * W_up x)

Where g is 0, a row of W_up and a column of W_down have no effect. For one row of activations the kernel reads
only the others; the layouts keep a neuron's codes together for that. They are described to the byte in
csrc/kernels/sparse_mlp.h: W_up in strips, one row behind the other, and W_down in slices of 128 rows, column
by column. Their groups are those of the matrix: scales of W_down belong to groups of neurons, so a slice has
them before each group's columns, and they are read when one neuron of the group passes.
"""

from __future__ import annotations

from cpm_edge.plugins.matmul_nbits.spec import NBitsShape

SLICE_ROWS = 128
CHUNK_ROWS = 64


def strip_bytes(shape: NBitsShape) -> int:
    """Bytes of one row of a matrix in strips."""
    return shape.padded_cols * shape.bits // 8 + shape.groups * (2 if shape.symmetric else 3)


def slice_count(shape: NBitsShape) -> int:
    return -(-shape.rows // SLICE_ROWS)


def slice_bytes(shape: NBitsShape) -> int:
    """Bytes of one slice."""
    header = SLICE_ROWS * (2 if shape.symmetric else 3)
    return shape.groups * header + shape.padded_cols * SLICE_ROWS * shape.bits // 8
