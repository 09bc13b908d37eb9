"""Finding the linear layers of a traced graph: MatMul(x, Transpose(weight))."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Linear:
    """One use of a weight as y = x @ weight.T; ``transpose`` may be shared by several."""

    weight: ir.Value
    transpose: ir.Node
    matmul: ir.Node

    @property
    def x(self) -> ir.Value:
        value = self.matmul.inputs[0]
        assert value is not None
        return value


def find_linears(graph: ir.Graph) -> list[Linear]:
    """Every product with a transposed initializer, in graph order."""
    found = []
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        weight = transpose.inputs[0]
        if weight is not None and weight.name in graph.initializers:
            found.append(Linear(weight, transpose, node))
    return found


def replace_linears(graph: ir.Graph, build: Callable[[Linear], Sequence[ir.Node]]) -> int:
    """Replace each linear layer by the nodes that ``build`` returns, the last of which makes y.

    Returns:
        How many layers were replaced.
    """
    linears = find_linears(graph)
    for linear in linears:
        nodes = build(linear)
        ir.convenience.replace_nodes_and_values(
            graph, linear.matmul, [linear.matmul], nodes, linear.matmul.outputs, nodes[-1].outputs
        )
    for transpose in {linear.transpose for linear in linears}:
        if not transpose.outputs[0].uses():
            graph.remove(transpose, safe=True)
    return len(linears)
