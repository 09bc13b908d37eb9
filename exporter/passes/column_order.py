"""Weights whose columns are stored in another order: their products get the activations in that order.

GPTQ with act order spreads a group over the whole row. Its columns are sorted by group, so that engines find
groups side by side, and a Gather puts the activations into the same order: the product is the same.
"""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.linear import find_linears
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import TensorClass

ORDER = "column_order."


def gather_columns(graph: ir.Graph, weights: ModelWeights) -> int:
    """Put a Gather before every product whose weight has a ``column_order``; equal ones are shared.

    Returns:
        How many there are.

    Raises:
        ExportError: such a weight is not that of a product.
    """
    absorbed = [name for name in weights.names() if weights.kind(name) is TensorClass.ABSORBED]
    ordered = {name for name in weights.own if weights.column_order(name) is not None} - set(absorbed)
    gathered: dict[tuple[ir.Value, str], ir.Value] = {}
    for linear in find_linears(graph):
        order = weights.column_order(linear.weight.name or "")
        if order is None:
            continue
        ordered.discard(linear.weight.name or "")
        indices = order.astype(np.int32)
        name = ORDER + hashlib.sha256(indices.tobytes()).hexdigest()[:16]
        key = (linear.x, name)
        if key not in gathered:
            builder = Builder(graph)
            constant = builder.constant(name, indices, np.int32)
            layer = (linear.weight.name or "").removesuffix(".weight")
            gathered[key] = builder.op(
                "Gather", [linear.x, constant], {"axis": -1}, name=f"{layer}.sorted_columns"
            )
            graph.insert_before(linear.matmul, builder.nodes)
        linear.matmul.replace_input_with(0, gathered[key])
    if ordered:
        raise ExportError(
            f"tensor {min(ordered)}: its columns are in act order (desc_act), which products alone take",
            hint="--flavour stock, or export a checkpoint that was quantized with desc_act false",
        )
    return len(gathered) + _restore_absorbed(graph, weights, absorbed)


def _restore_absorbed(graph: ir.Graph, weights: ModelWeights, absorbed: list[str]) -> int:
    """Put the columns of a matrix whose parts the graph uses into their places before any product."""
    count = 0
    for name in absorbed:
        if (order := weights.column_order(name)) is None:
            continue
        weight = graph.initializers[name]
        users = list(weight.uses())
        builder = Builder(graph)
        layer = name.removesuffix(".weight")
        places = builder.constant(f"{layer}.places", np.argsort(order), np.int32)
        restored = builder.op("Gather", [weight, places], {"axis": 1}, name=f"{layer}.restored")
        builder.insert_first()
        for node, index in users:
            node.replace_input_with(index, restored)
        count += 1
    return count


def gather_before_norms(graph: ir.Graph) -> None:
    """Move each of these Gathers from behind a normalization to its input and weight, for fused kernels.

    RMSNormalization treats all columns alike, so its result is the same in any order.

    Raises:
        ExportError: a normalization is read in several orders, so no fused product can read it.
    """
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        users = {node for node, _ in norm.outputs[0].uses()}
        gathers = {user for user in users if user.op_type == "Gather" and _order_of(user) is not None}
        if not gathers:
            continue
        (gather, *others) = sorted(gathers, key=lambda node: node.name or "")
        if others or users != gathers:
            raise ExportError(
                f"{gather.name}: the native flavour runs the products of one normalization as one, and these "
                "have different column orders (desc_act)",
                hint="--flavour stock",
            )
        builder = Builder(graph)
        x, weight = norm.inputs[0], norm.inputs[1]
        name = gather.name or ""
        indices = gather.inputs[1]
        sorted_x = builder.op("Gather", [x, indices], {"axis": -1}, name=f"{name}.input")
        sorted_weight = builder.op("Gather", [weight, indices], {"axis": -1}, name=f"{name}.norm")
        graph.insert_before(norm, builder.nodes)
        norm.replace_input_with(0, sorted_x)
        norm.replace_input_with(1, sorted_weight)
        ir.convenience.replace_all_uses_with(gather.outputs[0], norm.outputs[0])
        graph.remove(gather, safe=True)


def _order_of(gather: ir.Node) -> str | None:
    """The name of the order that a Gather applies; None if it is another Gather."""
    indices = gather.inputs[1]
    name = indices.name if indices is not None else None
    return name if name is not None and name.startswith(ORDER) else None
