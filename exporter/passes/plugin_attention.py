"""Attention and linear attention as plugin nodes that carry their launch plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.engine_ports import PAST_LENGTH
from cpm_edge.exporter.passes.plugin_weights import STOCK, plugin_attributes
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.launch_plan import LaunchPlan
from cpm_edge.plugins.linear_attention.launches import linear_attention_plan
from cpm_edge.plugins.linear_attention.spec import OP as LINEAR
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.plugins.sparse_attention.launches import plan as attention_plan
from cpm_edge.plugins.sparse_attention.spec import OP as SPARSE
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

POOLED = "pooled"


def place_plugins(graph: ir.Graph, spec: SparseAttentionSpec, plans: list[LaunchPlan]) -> None:
    """Replace the attention nodes of a graph with its ports fixed; sparse layers get a pooled cache each.

    Args:
        spec: of the layers that have keys.
        plans: takes the launch plan of every node.

    Raises:
        ExportError: sizes that the kernels do not take.
    """
    for node in list(graph):
        if (node.domain, node.op_type) == (DOMAIN, SPARSE):
            plans.append(_place_attention(graph, node, spec))
        elif (node.domain, node.op_type) == (DOMAIN, LINEAR):
            plans.append(_place_linear(graph, node))


def check_attention(spec: SparseAttentionSpec, size: int, capacity: int) -> None:
    """Raises ExportError for sizes that the kernels do not take."""
    _planned(lambda: attention_plan(spec, size, capacity))


def _place_attention(graph: ir.Graph, node: ir.Node, spec: SparseAttentionSpec) -> LaunchPlan:
    keys = node.inputs[3]
    _, heads, capacity, size = _sizes(keys)
    past = next(value for value in graph.inputs if value.name == PAST_LENGTH)
    plan = _planned(lambda: attention_plan(spec, size, capacity))
    inputs = [*node.inputs[:5], past]
    if spec.is_dense:
        placed = _node(f"Cpm{SPARSE}", inputs, spec.attributes(), plan, 3, node.name)
    else:
        layer = ((keys and keys.name) or "").split(".")[1]
        shape = ir.Shape([1, heads, capacity // spec.kernel_stride, size])
        before = _half(f"past_key_values.{layer}.{POOLED}", shape)
        placed = _node(f"Cpm{SPARSE}", [*inputs, before], spec.attributes(), plan, 4, node.name)
        after = placed.outputs[3]
        after.name, after.shape, after.type = f"present.{layer}.{POOLED}", shape, before.type
        _insert_after(graph.inputs, node.inputs[4], before)
        _insert_after(graph.outputs, node.outputs[2], after)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [placed], node.outputs, placed.outputs[:3])
    return plan


def _place_linear(graph: ir.Graph, node: ir.Node) -> LaunchPlan:
    decay = tuple(node.attributes.get_floats("decay"))
    spec = LinearAttentionSpec(decay, node.attributes.get_float("scale"))
    state = node.inputs[3]
    _, heads, size, value_size = _sizes(state)
    logarithms = Builder(graph).constant(f"decay_of_{heads}_heads", decay, np.float32)
    plan = _planned(lambda: linear_attention_plan(spec, size, value_size))
    attributes = {"scale": spec.scale, "heads": heads}
    placed = _node(f"Cpm{LINEAR}", [*node.inputs, logarithms], attributes, plan, 2, node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [placed], node.outputs, placed.outputs)
    return plan


def _planned(make: Callable[[], LaunchPlan]) -> LaunchPlan:
    try:
        return make()
    except ValueError as error:
        shorter = "a smaller --max-context, or " if str(error).startswith("capacity") else ""
        raise ExportError(f"--flavour native: {error}", hint=f"{shorter}{STOCK}") from error


def _node(
    name: str,
    inputs: list[ir.Value | None],
    attributes: Mapping[str, Any],
    plan: LaunchPlan,
    outputs: int,
    node_name: str | None,
) -> ir.Node:
    converted = ir.convenience.convert_attributes({**attributes, **plugin_attributes(plan)})
    return ir.Node(DOMAIN, name, inputs, converted, num_outputs=outputs, name=node_name)


def _sizes(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None and value.shape is not None
    return value.shape.numpy()


def _half(name: str, shape: ir.Shape) -> ir.Value:
    return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT16))


def _insert_after(values: Any, after: ir.Value | None, value: ir.Value) -> None:
    values.insert(values.index(after) + 1, value)
