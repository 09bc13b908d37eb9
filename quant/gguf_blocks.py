"""Blocks of 32 columns as llama.cpp stores them, whose integers are those of int4 and int8 here.

    Q4_0  18 bytes: float16 d, 16 bytes                       weight = (code - 8) * d
    Q4_1  20 bytes: float16 d, float16 m, 16 bytes            weight = code * d + m
    Q8_0  34 bytes: float16 d, 32 signed bytes                weight = code * d

Byte i of the 4-bit blocks holds column i in its lower half and column i + 16 in its upper half. A block of
zeros has d = 0; here it gets ZERO_GROUP_SCALE and the codes of zero, since engines do not take a scale of 0.

Source: ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.floats import refuse_non_finite
from cpm_edge.quant.formats import Quantized, Scheme, WeightFormat
from cpm_edge.quant.int4 import ZERO as ZERO_INT4
from cpm_edge.quant.int4 import Bytes
from cpm_edge.quant.int8 import ZERO as ZERO_INT8
from cpm_edge.quant.scales import ZERO_GROUP_SCALE, Floats

WIDTH = 32
Q4_0_BYTES, Q4_1_BYTES, Q8_0_BYTES = 18, 20, 34
SYMMETRIC_INT4 = Scheme(WeightFormat.INT4, WIDTH)
ASYMMETRIC_INT4 = Scheme(WeightFormat.INT4, WIDTH, symmetric=False)
INT8 = Scheme(WeightFormat.INT8, WIDTH)


def unpack_q4_0(rows: Bytes) -> Quantized:
    """Symmetric int4 of uint8 (rows, blocks * 18).

    Raises:
        QuantError: NaN or infinity, with the row; bytes that are no blocks.
    """
    blocks = _blocks(rows, Q4_0_BYTES)
    return _quantized(_nibbles(blocks[:, :, 2:]), _halves(blocks, 0), None, ZERO_INT4, SYMMETRIC_INT4)


def unpack_q8_0(rows: Bytes) -> Quantized:
    """int8 in groups of 32, of uint8 (rows, blocks * 34).

    Raises:
        QuantError: as unpack_q4_0.
    """
    blocks = _blocks(rows, Q8_0_BYTES)
    codes = blocks[:, :, 2:] ^ np.uint8(ZERO_INT8)  # two's complement plus 128
    return _quantized(codes, _halves(blocks, 0), None, ZERO_INT8, INT8)


def unpack_q4_1(rows: Bytes) -> Quantized | None:
    """Asymmetric int4 of uint8 (rows, blocks * 20); None unless every m is a whole multiple of -d, up to 15.

    Raises:
        QuantError: as unpack_q4_0.
    """
    blocks = _blocks(rows, Q4_1_BYTES)
    scales, least = _halves(blocks, 0), _halves(blocks, 2)
    _check_finite(scales)
    _check_finite(least)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zeros = np.nan_to_num(np.rint(-least / scales), nan=0.0, posinf=-1.0, neginf=-1.0)
    if ((zeros < 0) | (zeros > 15) | (zeros * scales != -least)).any():
        return None
    return _quantized(_nibbles(blocks[:, :, 4:]), scales, zeros.astype(np.uint8), 0, ASYMMETRIC_INT4)


def _quantized(codes: Bytes, scales: Floats, zeros: Bytes | None, zero: int, scheme: Scheme) -> Quantized:
    """From codes (rows, blocks, 32); blocks whose scale is 0 are made zeros."""
    _check_finite(scales)
    empty = scales == 0
    if empty.any():
        codes[empty] = zero
        scales = np.where(empty, ZERO_GROUP_SCALE, scales)
        if zeros is not None:
            zeros[empty] = zero
    return Quantized(codes.reshape(len(codes), -1), scales, zeros, scheme)


def _check_finite(values: Floats) -> None:
    finite: npt.NDArray[np.bool_] = np.isfinite(values)
    refuse_non_finite(np.logical_and.reduce(finite, axis=1))


def _blocks(rows: Bytes, size: int) -> Bytes:
    if rows.ndim != 2 or rows.shape[1] % size:
        raise QuantError(f"expected rows of blocks of {size} bytes, got {rows.shape}")
    return rows.reshape(len(rows), -1, size)


def _halves(blocks: Bytes, offset: int) -> npt.NDArray[np.float32]:
    """The float16 at a place of each block, (rows, blocks)."""
    pairs = np.ascontiguousarray(blocks[:, :, offset : offset + 2])
    return pairs.view("<f2")[:, :, 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(rows, blocks, 16) bytes to (rows, blocks, 32) codes: the lower halves first."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=2)
