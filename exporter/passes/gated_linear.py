"""cpm.LinearAttention to com.microsoft LinearAttention, as ONNX Runtime runs it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.grouped_query import MICROSOFT
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.linear_attention.spec import OP


def lower_linear_attention(graph: ir.Graph) -> int:
    """Replace every linear attention node; its constant decays become an input, one row a token.

    Args:
        graph: changed in place; has the nodes of ``past_from_attention_mask``.

    Returns:
        How many nodes were replaced.
    """
    nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP)]
    if not nodes:
        return 0
    graph.opset_imports[MICROSOFT] = 1
    made = {node.name: node.outputs[0] for node in graph}
    batch, rows = made["batch_size"], made["new_length"]
    decays: dict[tuple[float, ...], ir.Value] = {}
    for node in nodes:
        decay = tuple(node.attributes.get_floats("decay"))
        if decay not in decays:
            decays[decay] = _decay_rows(graph, decay, batch, rows, f"decay_{len(decays)}")
        heads = len(decay)
        attention = ir.Node(
            MICROSOFT,
            OP,
            [*node.inputs, decays[decay]],
            ir.convenience.convert_attributes(
                {
                    "q_num_heads": heads,
                    "kv_num_heads": heads,
                    "update_rule": "gated",
                    "scale": node.attributes.get_float("scale"),
                }
            ),
            num_outputs=2,
            name=node.name,
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [attention], node.outputs, attention.outputs
        )
    return len(nodes)


def _decay_rows(
    graph: ir.Graph, decay: tuple[float, ...], batch: ir.Value, rows: ir.Value, name: str
) -> ir.Value:
    """(batch, rows, heads)"""
    builder = Builder(graph)
    heads = builder.constant(f"{name}_heads", [len(decay)])
    shape = builder.op("Concat", [batch, rows, heads], {"axis": 0}, name=f"{name}_shape")
    once = builder.constant(f"{name}_log", np.reshape(decay, (1, 1, -1)), np.float32)
    expanded = builder.op("Expand", [once, shape], name=f"{name}_rows")
    after = batch.producer()
    assert after is not None
    graph.insert_after(after, builder.nodes)
    return expanded
