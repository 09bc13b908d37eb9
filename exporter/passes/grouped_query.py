"""Dense cpm.SparseAttention (topk 0) to com.microsoft GroupQueryAttention, as ONNX Runtime runs it.

The latent form stays: GroupQueryAttention wants a second cache for the values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.sparse_attention.spec import OP

MICROSOFT = "com.microsoft"


def _is_grouped(node: ir.Node) -> bool:
    """Dense, with keys and values of their own."""
    return node.attributes.get_int("topk") == 0 and node.attributes.get_int("v_head_size", 0) == 0


def lower_dense_attention(graph: ir.Graph, total: ir.Value) -> int:
    """Replace every dense attention node.

    Args:
        graph: changed in place.
        total: int64 (1,), tokens in the cache after this step.

    Returns:
        How many nodes were replaced.
    """
    nodes = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP) and _is_grouped(n)]
    if not nodes:
        return 0
    lengths = Builder(graph)
    total32 = lengths.op("Cast", [total], {"to": ir.DataType.INT32.value}, name="total_length_int32")
    one = lengths.constant("one_int32", [1], np.int32)
    last = lengths.op("Sub", [total32, one], name="last_position")
    batch = next(node.outputs[0] for node in graph if node.name == "batch_size")
    last_rows = lengths.op("Expand", [last, batch], name="seqlens_k")
    scalar = lengths.constant("scalar_shape", np.empty(0), np.int64)
    longest = lengths.op("Reshape", [total32, scalar], name="total_sequence_length")
    assert batch.producer() is not None
    graph.insert_after(batch.producer(), lengths.nodes)  # type: ignore[arg-type]
    graph.opset_imports[MICROSOFT] = 1
    for node in nodes:
        query, key, value, key_cache, value_cache, _ = node.inputs
        attention = ir.Node(
            MICROSOFT,
            "GroupQueryAttention",
            [query, key, value, key_cache, value_cache, last_rows, longest],
            ir.convenience.convert_attributes(
                {
                    "num_heads": node.attributes.get_int("num_heads"),
                    "kv_num_heads": node.attributes.get_int("kv_num_heads"),
                    "scale": node.attributes.get_float("scale"),
                }
            ),
            num_outputs=3,
            name=node.name,
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [attention], node.outputs, attention.outputs
        )
    return len(nodes)
