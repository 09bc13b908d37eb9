"""The byte layouts of the engines: codes are moved, never changed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.formats import Quantized, WeightFormat
from cpm_edge.quant.int4 import Bytes, pack_int4, pack_zeros_int4
from cpm_edge.quant.ternary import pack_ternary, ternary_as_int4


class NBits(NamedTuple):
    """The inputs of com.microsoft MatMulNBits beside A.

    B is uint8 (rows, blocks, block * bits // 8), scales float32 (rows * blocks,), zero_points uint8
    (rows * ceil(blocks / 2),) for int4 with stored zero points, else None (the op's default 2**(bits-1)).
    """

    B: Bytes
    scales: npt.NDArray[np.float32]
    zero_points: Bytes | None


def matmulnbits(q: Quantized, block: int) -> NBits:
    """The MatMulNBits inputs (bits 2, 4 or 8, ``block_size=block``, N = rows, K = cols).

    A scale that covers several blocks is repeated. Columns that ``block`` does not divide are filled up
    with the zero point, so the padding dequantizes to 0. Ternary codes move up by one, to the op's own zero
    point 2, which then need not be stored. Row blocks laid out one by one and concatenated equal the whole.

    Source: onnxruntime's docs/ContribOperators.md, com.microsoft.MatMulNBits.

    Raises:
        QuantError: block is not a power of two of at least 16, or does not divide the group size.
    """
    if block < 16 or block & (block - 1):
        raise QuantError(f"MatMulNBits block size: expected a power of two of at least 16, got {block}")
    width = q.scheme.group_size
    if width is not None and width % block:
        raise QuantError(
            f"MatMulNBits blocks of {block} columns do not fit into groups of {width}",
            hint=f"use block size {width}",
        )
    rows, cols = q.codes.shape
    blocks = -(-cols // block)
    repeat = blocks if width is None else width // block
    codes = _pad_columns(q, blocks * block)
    if q.scheme.format is WeightFormat.INT4:
        codes = pack_int4(codes)
    elif q.scheme.format is WeightFormat.TERNARY:
        codes = pack_ternary(codes + np.uint8(1))
    zeros = None if q.zeros is None else pack_zeros_int4(np.repeat(q.zeros, repeat, axis=1)).reshape(-1)
    scales = np.repeat(q.scales, repeat, axis=1).reshape(-1)
    return NBits(codes.reshape(rows, blocks, block * q.scheme.bits // 8), scales, zeros)


def _pad_columns(q: Quantized, cols: int) -> Bytes:
    """Codes (rows, cols), filled up with the row's last zero point."""
    rows, have = q.codes.shape
    if cols == have:
        return q.codes
    codes = np.empty((rows, cols), np.uint8)
    codes[:, :have] = q.codes
    codes[:, have:] = q.zero_code if q.zeros is None else q.zeros[:, -1:]
    return codes


def openvino_i4(q: Quantized) -> Bytes:
    """The bytes of an OpenVINO ``i4`` constant [rows, cols]: uint8 (rows, cols // 2).

    Two's complement nibbles -8..7, the even column in the low nibble.

    Raises:
        QuantError: not symmetric int4, or an odd number of columns.
    """
    _expect(q, WeightFormat.INT4, symmetric=True, layout="OpenVINO i4")
    return _signed_nibbles(q)


def onnx_int4(q: Quantized) -> Bytes:
    """The bytes of an ONNX INT4 tensor [rows, cols], as external data holds it: uint8 (rows, cols // 2).

    Two's complement nibbles -8..7, the even column in the low nibble. Ternary codes become -1, 0 and 1, in
    the same groups: nothing is rounded.

    Source: onnx/docs/docsgen/source/technical/int4.md.

    Raises:
        QuantError: neither symmetric int4 nor ternary, or an odd number of columns.
    """
    if q.scheme.format is WeightFormat.TERNARY:
        q = ternary_as_int4(q)
    _expect(q, WeightFormat.INT4, symmetric=True, layout="ONNX INT4")
    return _signed_nibbles(q)


def _signed_nibbles(q: Quantized) -> Bytes:
    # Adding 8 modulo 16 flips the top bit of the nibble and nothing else.
    packed = pack_int4(q.codes)
    packed ^= np.uint8(0x88)
    return packed


def openvino_u4(q: Quantized) -> tuple[Bytes, Bytes]:
    """The bytes of two OpenVINO ``u4`` constants: codes [rows, cols] and zero points [rows, groups].

    Returns uint8 (rows, cols // 2) and uint8 (ceil(rows * groups / 2),), low nibble first. OpenVINO packs
    a constant as one run of nibbles, so with an odd number of groups a row may start within a byte: give
    row blocks an even number of rows, then the concatenated blocks equal the whole.

    Raises:
        QuantError: not asymmetric int4, or an odd number of columns.
    """
    _expect(q, WeightFormat.INT4, symmetric=False, layout="OpenVINO u4")
    assert q.zeros is not None
    return pack_int4(q.codes), pack_zeros_int4(q.zeros.reshape(1, -1)).reshape(-1)


def openvino_u2(q: Quantized) -> Bytes:
    """The bytes of an OpenVINO ``u2`` constant [rows, cols]: uint8 (rows, cols // 4), zero point 1.

    Raises:
        QuantError: not ternary, or columns that 4 does not divide.
    """
    _expect(q, WeightFormat.TERNARY, symmetric=True, layout="OpenVINO u2")
    return pack_ternary(q.codes)


def openvino_i8(q: Quantized) -> npt.NDArray[np.int8]:
    """The values of an OpenVINO ``i8`` constant, and of an ONNX INT8 tensor: int8 (rows, cols), -127..127.

    Raises:
        QuantError: not int8.
    """
    _expect(q, WeightFormat.INT8, symmetric=True, layout="OpenVINO i8")
    return (q.codes ^ np.uint8(0x80)).view(np.int8)


def _expect(q: Quantized, format_: WeightFormat, *, symmetric: bool, layout: str) -> None:
    if q.scheme.format is not format_ or q.scheme.symmetric is not symmetric:
        wanted = f"{'symmetric' if symmetric else 'asymmetric'} {format_.value}"
        raise QuantError(f"{layout}: expected {wanted}, got {q.scheme.describe()}")
