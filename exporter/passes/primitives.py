"""Operators of opset 23 in those of opset 21, which the parser of TensorRT 10.3 reads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.parser_ops import OPSET


def lower_to_opset_21(model: ir.Model) -> None:
    """Write out RMSNormalization and RotaryEmbedding, and name the type of every CastLike.

    Raises:
        ExportError: a rotary embedding in a form that no model here uses, or a type that cannot be inferred.
    """
    graph = model.graph
    _name_types(model)
    halves: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.domain:
            continue
        builder = Builder(graph)
        if node.op_type == "RMSNormalization":
            _rms_norm(builder, node)
        elif node.op_type == "RotaryEmbedding":
            _rotary(builder, node, halves)
        else:
            continue
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], builder.nodes, node.outputs, builder.nodes[-1].outputs
        )
    graph.opset_imports[""] = OPSET


def _name_types(model: ir.Model) -> None:
    """A constant of the right type, or a Cast, instead of every CastLike."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ports = {*model.graph.inputs, *model.graph.outputs}
    for made in (value for node in model.graph for value in node.outputs if value not in ports):
        made.shape = made.type = None  # of the traced float32 graph
    ShapeInferencePass()(model)
    for node in [node for node in model.graph if node.op_type == "CastLike"]:
        value, like = node.inputs
        if value is None or like is None or like.dtype is None:
            raise ExportError(f"{node.name}: expected a known type to cast to")
        builder = Builder(model.graph)
        name = f"{value.name}_{like.dtype.name.lower()}"
        if value.const_value is not None:
            array = value.const_value.numpy().astype(like.dtype.numpy())
            cast: ir.Value = builder.constant(name, array, array.dtype)
        else:
            cast = builder.op("Cast", [value], {"to": like.dtype.value}, name=name)
        model.graph.insert_before(node, builder.nodes)
        ir.convenience.replace_all_uses_with(node.outputs[0], cast)
        model.graph.remove(node, safe=True)


def _rms_norm(builder: Builder, node: ir.Node) -> None:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, float32."""
    x, weight = node.inputs[0], node.inputs[1]
    name = node.outputs[0].name or ""
    axis = builder.constant("last_axis", [-1])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    eps = builder.constant(f"epsilon_{epsilon:g}", epsilon, "float32")
    square = builder.op("Mul", [x, x], name=f"{name}_square")
    mean = builder.op("ReduceMean", [square, axis], {"keepdims": 1}, name=f"{name}_mean")
    shifted = builder.op("Add", [mean, eps], name=f"{name}_shifted")
    root = builder.op("Sqrt", [shifted], name=f"{name}_root")
    unit = builder.op("Div", [x, root], name=f"{name}_unit")
    builder.op("Mul", [unit, weight], name=name)


def _rotary(builder: Builder, node: ir.Node, halves: dict[ir.Value, ir.Value]) -> None:
    """The halves of every head turned by their angles; x (1, T, heads * D), cos and sin (1, T, D / 2)."""
    heads = node.attributes.get_int("num_heads", 0)
    if not heads or node.attributes.get_int("interleaved", False) or len(node.inputs) != 3:
        raise ExportError(f"{node.name}: expected a rotary embedding of three inputs, its halves paired")
    x, name = node.inputs[0], node.outputs[0].name or ""
    two = builder.constant("axis_2", [2])
    cos, sin = (_of_heads(builder, value, two, halves) for value in node.inputs[1:])
    split = builder.constant(f"split_{heads}_heads", [0, 0, heads, -1])
    rows = builder.op("Reshape", [x, split], name=f"{name}_heads")
    parts = ir.Node(
        "", "Split", [rows], [ir.AttrInt64("axis", -1), ir.AttrInt64("num_outputs", 2)], num_outputs=2
    )
    parts.name = f"{name}_halves"
    builder.nodes.append(parts)
    first, second = parts.outputs
    first.name, second.name = f"{name}_first", f"{name}_second"

    def times(value: ir.Value, factor: ir.Value, what: str) -> ir.Value:
        return builder.op("Mul", [value, factor], name=f"{name}_{what}")

    turned = [
        builder.op(
            "Sub", [times(first, cos, "first_cos"), times(second, sin, "second_sin")], name=f"{name}_left"
        ),
        builder.op(
            "Add", [times(second, cos, "second_cos"), times(first, sin, "first_sin")], name=f"{name}_right"
        ),
    ]
    joined = builder.op("Concat", turned, {"axis": -1}, name=f"{name}_turned")
    builder.op("Reshape", [joined, builder.constant("merge_heads", [0, 0, -1])], name=name)


def _of_heads(
    builder: Builder, value: ir.Value | None, axis: ir.Value, halves: dict[ir.Value, ir.Value]
) -> ir.Value:
    """(1, T, D / 2) to (1, T, 1, D / 2), once for all layers."""
    assert value is not None
    if value not in halves:
        halves[value] = builder.op("Unsqueeze", [value, axis], name=f"{value.name}_of_heads")
    return halves[value]
