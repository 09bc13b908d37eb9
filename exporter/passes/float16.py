"""Types for a strongly typed network: products and attention in float16, all else in float32.

Norms, rotary angles, gates and the residual stream stay in float32: they are element-wise, so an engine fuses
them with the casts around them and no float32 activation is written but the residual's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from cpm_edge.exporter.passes.builder import Builder

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT

# Operators that move values and keep their type.
_MOVES = frozenset(("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "Identity", "Expand"))


@dataclass(frozen=True)
class HalfOp:
    """An operator whose first ``inputs`` inputs are float16; ``outputs`` says whether its results are too."""

    inputs: int
    outputs: bool = True


def narrow_products(graph: ir.Graph, half: set[ir.Value], ops: Mapping[str, HalfOp]) -> None:
    """Insert the casts.

    Args:
        graph: in topological order, changed in place; all of its floats are float32 but for ``half``.
        half: inputs, initializers and results that are float16 already.
        ops: by operator type what takes float16. A MatMul whose right side is a float32 initializer is left.
    """
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    half = set(half)
    for node in list(graph):
        if not node.domain and node.op_type in _MOVES:
            if node.inputs[0] in half:
                half.add(node.outputs[0])
            continue
        rule = ops.get(node.op_type)
        if rule is not None and not _is_wide_product(node, half):
            for index, value in enumerate(node.inputs[: rule.inputs]):
                if value is not None and value not in half:
                    node.replace_input_with(index, _cast(graph, node, value, HALF, casts))
            if rule.outputs:
                half.update(node.outputs)
        elif node.op_type not in ("Shape", "Cast", "DequantizeLinear"):
            for index, value in enumerate(node.inputs):
                if value is not None and value in half and not _is_cache(value):
                    node.replace_input_with(index, _cast(graph, node, value, FLOAT, casts))
    for index, value in enumerate(graph.outputs):
        if value in half and value.dtype == FLOAT:
            _widen_output(graph, index, value)


def _widen_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    """The output keeps its name and type; what made it gets another."""
    name, shape, kind = value.name or "", value.shape, value.type
    value.name, value.shape, value.type = f"{name}_float16", None, None
    builder = Builder(graph)
    wide = builder.op("Cast", [value], {"to": FLOAT.value}, name=name)
    wide.shape, wide.type = shape, kind
    graph.extend(builder.nodes)
    graph.outputs[index] = wide


def _is_cache(value: ir.Value) -> bool:
    return (value.name or "").startswith("past_key_values.")


def _is_wide_product(node: ir.Node, half: set[ir.Value]) -> bool:
    """Whether it multiplies with float32 weights: a router, which rounding would make choose others."""
    if node.op_type != "MatMul":
        return False
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    weight = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value
    return weight is not None and weight.is_initializer() and weight not in half


def _cast(
    graph: ir.Graph,
    user: ir.Node,
    value: ir.Value,
    dtype: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    if (value, dtype) not in casts:
        builder = Builder(graph)
        suffix = "float16" if dtype is HALF else "float32"
        casts[value, dtype] = builder.op("Cast", [value], {"to": dtype.value}, name=f"{value.name}_{suffix}")
        graph.insert_before(user, builder.nodes)
    return casts[value, dtype]
