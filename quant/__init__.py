"""Weights to fewer bits, with numpy alone.

Every function takes a block of rows and treats each row by itself, so a caller may walk a tensor of any
size in blocks and gets the same bytes as from the whole.
"""

from __future__ import annotations

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.floats import check_finite, from_bf16_bits, to_bf16_bits, to_fp16
from cpm_edge.quant.formats import GROUP_SIZES, Quantized, Scheme, WeightFormat, fit_group
from cpm_edge.quant.int4 import pack_int4, pack_zeros_int4, quantize_int4, unpack_int4
from cpm_edge.quant.int8 import quantize_int8
from cpm_edge.quant.layouts import (
    NBits,
    matmulnbits,
    onnx_int4,
    openvino_i4,
    openvino_i8,
    openvino_u2,
    openvino_u4,
)
from cpm_edge.quant.policy import DEFAULT_GROUP_SIZE, Policy, TensorClass
from cpm_edge.quant.quantize import quantize
from cpm_edge.quant.ternary import (
    TERNARY_GROUPS,
    TernaryGroups,
    find_ternary,
    is_ternary,
    pack_ternary,
    quantize_ternary,
    ternary_as_int4,
    unpack_ternary,
)

__all__ = [
    "DEFAULT_GROUP_SIZE",
    "GROUP_SIZES",
    "TERNARY_GROUPS",
    "NBits",
    "Policy",
    "QuantError",
    "Quantized",
    "Scheme",
    "TensorClass",
    "TernaryGroups",
    "WeightFormat",
    "check_finite",
    "find_ternary",
    "fit_group",
    "from_bf16_bits",
    "is_ternary",
    "matmulnbits",
    "onnx_int4",
    "openvino_i4",
    "openvino_i8",
    "openvino_u2",
    "openvino_u4",
    "pack_int4",
    "pack_ternary",
    "pack_zeros_int4",
    "quantize",
    "quantize_int4",
    "quantize_int8",
    "quantize_ternary",
    "ternary_as_int4",
    "to_bf16_bits",
    "to_fp16",
    "unpack_int4",
    "unpack_ternary",
]
