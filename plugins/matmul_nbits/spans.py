"""The layout of weights that the Triton kernels read, packed in numpy.

A row of codes is cut into spans of ``span`` columns: a group, and at least 64 columns with 2 bits, so that
every part below has 16. A span is cut into 8 / bits parts of equal width; byte j of the span holds column j
of each part, the first part in the lowest bits. So one load of bytes gives that many contiguous runs of
columns, and a dot product needs no interleaving.

    codes   uint8    (N, spans * span * bits / 8)
    scales  float16  (spans * groups a span, N)
    zeros   uint8    likewise; asymmetric weights only

Scales lie the other way round, because the kernels read those of many rows and one group at a time. Where
the columns are not whole spans (2 bits in groups of 32), the rest has the zero point as its code and 0 as its
scale.

With 8 bits a row is one group: codes (N, K) as they are, zero point 128, and scales (1, N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.kernel_config import ALIGNMENT
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape

Bytes = npt.NDArray[np.uint8]
Number = TypeVar("Number", bound=np.generic)

GROUPS = (32, 64, 128)
SMALLEST_PART = 16


@dataclass(frozen=True)
class Spans:
    """One matrix as the kernels read it; shapes as above."""

    codes: Bytes
    scales: npt.NDArray[np.float16]
    zeros: Bytes | None


def check_shape(shape: NBitsShape) -> None:
    """Refuse a format that no kernel takes.

    Raises:
        ValueError: as ``span_of``; with 8 bits, groups within a row, or columns that 16 does not divide.
    """
    if shape.bits != 8:
        span_of(shape.bits, shape.group)
    elif shape.group:
        raise ValueError(f"group: expected 0, one scale a row, with 8 bits, got {shape.group}")
    elif shape.cols % ALIGNMENT:
        raise ValueError(f"columns: expected a multiple of {ALIGNMENT} with 8 bits, got {shape.cols}")


def span_of(bits: int, group: int) -> int:
    """Columns of a span.

    Raises:
        ValueError: bits or a group that the kernels do not take; larger groups are split by repeating scales.
    """
    if bits not in (2, 4):
        raise ValueError(f"bits: expected 2 or 4, got {bits}")
    if group not in GROUPS:
        raise ValueError(f"group: expected one of {', '.join(map(str, GROUPS))}, got {group}")
    return max(group, SMALLEST_PART * 8 // bits)


def pack_spans(
    shape: NBitsShape, codes: Bytes, scales: npt.NDArray[np.floating], zeros: Bytes | None
) -> Spans:
    """The layout of a block of rows; codes of blocks concatenate along axis 0, scales and zeros along axis 1.

    Args:
        codes: (rows, cols) 0..2^bits-1.
        scales: (rows, groups), exact in float16; zeros likewise, None exactly when symmetric.

    Raises:
        ValueError: a format that the kernels do not take, or zeros that do not fit it.
    """
    check_shape(shape)
    if shape.symmetric is not (zeros is None):
        raise ValueError(f"zeros: expected {'none' if shape.symmetric else 'some'} for {shape}")
    if shape.bits == 8:
        return Spans(np.ascontiguousarray(codes), _by_group(scales.astype(np.float16), 1, 0), None)
    span = span_of(shape.bits, shape.group)
    width = -(-shape.cols // span) * span
    filled = np.full((shape.rows, width), shape.zero, np.uint8)
    filled[:, : shape.cols] = codes
    parts = filled.reshape(shape.rows, width // span, 8 // shape.bits, -1)
    packed = parts[:, :, 0].copy()
    for part in range(1, 8 // shape.bits):
        packed |= parts[:, :, part] << np.uint8(shape.bits * part)
    groups = width // shape.group
    return Spans(
        packed.reshape(shape.rows, -1),
        _by_group(scales.astype(np.float16), groups, 0),
        None if zeros is None else _by_group(zeros, groups, shape.zero),
    )


def unpack_codes(shape: NBitsShape, packed: Bytes) -> Bytes:
    """Codes (rows, cols) of ``Spans.codes``."""
    if shape.bits == 8:
        return packed
    span = span_of(shape.bits, shape.group)
    spans = packed.reshape(len(packed), -1, 1, span * shape.bits // 8)
    shifts = (shape.bits * np.arange(8 // shape.bits, dtype=np.uint8))[:, None]
    codes: Bytes = (spans >> shifts) & np.uint8((1 << shape.bits) - 1)
    return codes.reshape(len(packed), -1)[:, : shape.cols]


def _by_group(values: npt.NDArray[Number], groups: int, value: int) -> npt.NDArray[Number]:
    """(rows, groups at hand) as contiguous (groups, rows)."""
    filled = np.full((groups, len(values)), value, values.dtype)
    filled[: values.shape[1]] = values.T
    return filled
