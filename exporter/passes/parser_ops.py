"""The operators that an engine's graph may have: those that the parser of TensorRT 10.3 (JetPack 6) reads.

Source: docs/operators.md and docs/Changelog.md of onnx/onnx-tensorrt. INT4 DequantizeLinear is of ONNX opset
21 and was added in TensorRT 10.0; axes of Reduce, Squeeze and Unsqueeze must be initializers.
"""

from __future__ import annotations

import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.plugins import DOMAIN

OPSET = 21
_NAMES = """
Add And Cast Concat Cos DequantizeLinear Div Equal Exp Expand Flatten Gather Greater GreaterOrEqual
Identity Less LessOrEqual MatMul Max Min Mod Mul Not Or Pad Range ReduceMax ReduceMean ReduceSum Reshape
ScatterElements Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub TopK Transpose Unsqueeze Where
"""
OPERATORS = frozenset(_NAMES.split())
PLUGINS = frozenset(("CpmMatMulNBits", "CpmSparseAttention", "CpmLinearAttention"))
_CONSTANT_AXES = {"ReduceMax": 1, "ReduceMean": 1, "ReduceSum": 1, "Squeeze": 1, "Unsqueeze": 1}


def check_operators(graph: ir.Graph) -> None:
    """Refuse a graph that the parser would not read.

    Raises:
        ExportError: another opset, an operator that is not listed, or axes that are computed.
    """
    if graph.opset_imports[""] != OPSET:
        raise ExportError(f"the graph: expected opset {OPSET}, got {graph.opset_imports['']}")
    for node in graph:
        known = OPERATORS if not node.domain else PLUGINS if node.domain == DOMAIN else frozenset()
        if node.op_type not in known:
            raise ExportError(
                f"{node.name or node.op_type}: TensorRT 10.3 has no operator {node.domain}::{node.op_type}",
                hint="please report this with the model's config.json",
            )
        index = _CONSTANT_AXES.get(node.op_type)
        if index is not None and len(node.inputs) > index and not _is_constant(node.inputs[index]):
            raise ExportError(f"{node.name or node.op_type}: {node.op_type}: expected axes that are constant")


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer()
