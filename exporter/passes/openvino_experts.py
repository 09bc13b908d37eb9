"""cpm.MixtureOfExperts in OpenVINO's operators, in the form that its plugins read chosen experts from.

All experts of one product are one constant (experts, rows, columns), multiplied with the tokens repeated for
every expert. Written out, that computes everything; the CPU and GPU plugins recognise it and put their
GatherMatmul in place of the products, which computes and reads what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.passes.experts import Experts


def stack_experts(graph: ir.Graph, experts: list[Experts]) -> dict[str, list[str]]:
    """Give each node three stacked weights, inputs of the graph, in place of one weight an expert.

    Returns:
        The tensors of each stack, by the name of its input.
    """
    stacks: dict[str, list[str]] = {}
    for each in experts:
        inputs = list(each.node.inputs[:2])
        for part, tensors in (("w1", each.w1), ("w3", each.w3), ("w2", each.w2)):
            name = f"{each.prefix}.{part}"
            rows = graph.initializers[tensors[0]].shape
            assert rows is not None
            shape, kind = ir.Shape([len(tensors), *rows]), ir.TensorType(ir.DataType.FLOAT)
            inputs.append(ir.Value(name=name, shape=shape, type=kind))
            graph.inputs.append(inputs[-1])  # type: ignore[arg-type]
            stacks[name] = tensors
        attributes = each.node.attributes.values()
        node = ir.Node(
            each.node.domain, each.node.op_type, inputs, attributes, num_outputs=1, name=each.prefix
        )
        ir.convenience.replace_nodes_and_values(
            graph, each.node, [each.node], [node], each.node.outputs, node.outputs
        )
        for tensor in each.tensors:
            del graph.initializers[tensor]
    return stacks


def tiled_experts() -> Callable[[Any], list[Any]]:
    """A converter for OpenVINO's ONNX front end of nodes that ``stack_experts`` made."""
    import openvino.opset15 as ops

    def constant(*values: int) -> Any:
        return ops.constant(np.array(values, np.int64))

    def shares(logits: Any, experts: int, top_k: int) -> Any:
        """(tokens, experts), 0 where an expert was not chosen."""
        probability = ops.softmax(ops.reshape(logits, constant(-1, experts), special_zero=False), 1)
        best = ops.topk(
            probability, ops.constant(np.array(top_k)), 1, "max", "value", index_element_type="i32"
        )
        total = ops.reduce_sum(best.output(0), constant(1), keep_dims=True)
        none = ops.broadcast(ops.constant(np.float32(0)), ops.shape_of(probability))
        chosen = ops.divide(best.output(0), total)
        return ops.scatter_elements_update(none, best.output(1), chosen, constant(1))

    def convert(node: Any) -> list[Any]:
        x, logits, w1, w3, w2 = (node.get_input(i) for i in range(5))
        experts, top_k = node.get_attribute("num_experts"), node.get_attribute("top_k")
        hidden = int(w1.get_partial_shape()[2].get_length())
        rows = ops.reshape(x, constant(-1, hidden), special_zero=False)
        repeated = ops.tile(rows, constant(experts, 1))
        by_expert = ops.reshape(repeated, constant(experts, -1, hidden), special_zero=False)
        gate = ops.matmul(by_expert, w1, False, True)
        # A Swish of two inputs, as ops.swish makes it, would not be recognised.
        gated = ops.multiply(gate, ops.sigmoid(gate))
        inner = ops.multiply(gated, ops.matmul(by_expert, w3, False, True))
        output = ops.matmul(inner, w2, False, True)

        leading = ops.gather(ops.shape_of(x), constant(0, 1), ops.constant(np.array(0)))
        shape = ops.concat([constant(experts), leading], 0)
        split = ops.reshape(output, ops.concat([shape, constant(hidden)], 0), special_zero=False)
        weight = ops.transpose(shares(logits, experts, top_k), constant(1, 0))
        weight = ops.unsqueeze(ops.reshape(weight, shape, special_zero=False), constant(3))
        return [ops.reduce_sum(ops.multiply(split, weight), constant(0), keep_dims=False).output(0)]

    return convert
