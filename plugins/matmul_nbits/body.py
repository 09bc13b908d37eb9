"""ONNX function body of the plugin ``CpmMatMulNBits``: the layout of ``spans.py`` in standard operators.

For checks on a host, opset 21: weights are unpacked and multiplied in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset

from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape

cpm = Opset(DOMAIN, VERSION)
NAME = "CpmMatMulNBits"


@script(cpm, default_opset=op)
def CpmMatMulNBits(x, codes, scales, zeros, bits: int, group: int, k: int):  # noqa: N802
    """y (..., N) float16 of x (..., k) float16; codes int8 (N, row bytes), scales float16 (groups, N).

    Zeros are int8 (groups, N), or (1, 1) if all are equal; both codes and zeros are unsigned bytes.
    """
    width = op.Reshape(bits, [1])
    span_bytes = op.Max(op.Reshape(group, [1]) * width / 8, 16)
    spans = op.Reshape(op.Cast(codes, to=2), op.Concat([0, -1, 1], span_bytes, axis=0))
    part = op.Unsqueeze(op.Range(0, op.Squeeze(8 / width), 1), [1])
    shifted = op.BitShift(spans, op.Cast(part * width, to=2), direction="RIGHT")
    mask = op.BitShift(op.Cast([255], to=2), op.Cast(8 - width, to=2), direction="RIGHT")
    code = op.Cast(op.Reshape(op.BitwiseAnd(shifted, mask), [0, -1]), to=1)

    shape = op.Concat(op.Shape(scales, start=1, end=2), op.Shape(scales, start=0, end=1), [-1], axis=0)
    scale = op.Unsqueeze(op.Transpose(op.Cast(scales, to=1), perm=[1, 0]), [2])
    zero = op.Unsqueeze(op.Transpose(op.Cast(op.Cast(zeros, to=2), to=1), perm=[1, 0]), [2])
    weight = op.Reshape((op.Reshape(code, shape) - zero) * scale, [0, -1])
    used = op.Slice(weight, [0], op.Reshape(k, [1]), [1])
    return op.Cast(op.MatMul(op.Cast(x, to=1), op.Transpose(used, perm=[1, 0])), to=10)


def functions(*, opset: int = 21) -> list[ir.Function]:
    """The function, a fresh copy to put into a model.

    Args:
        opset: the model's version of ai.onnx, 21 or later; the operators used did not change since.
    """
    found = ir.serde.deserialize_function(CpmMatMulNBits.to_function_proto())
    found.opset_imports[""] = opset
    return [found]


def only_zero(bits: int) -> ir.Value:
    """An initializer for the input ``zeros`` of symmetric weights."""
    zero = np.full((1, 1), NBitsShape(1, 32, bits, 32).zero, np.uint8).view(np.int8)
    name = f"zero_of_{bits}_bits"
    tensor = ir.tensor(zero, name=name)
    return ir.Value(name=name, shape=ir.Shape([1, 1]), type=ir.TensorType(tensor.dtype), const_value=tensor)
