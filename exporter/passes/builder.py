"""A few lines that make building onnx_ir nodes read like the formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Builder:
    """Collects nodes for one place of a graph.

    Args:
        graph: takes the constants that the nodes use.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int | float | str] | None = None,
        *,
        name: str,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """Add a node and return its first output, which gets the node's name."""
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes or {}),
            num_outputs=outputs,
            name=name,
        )
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """A small constant, shared by its name."""
        if name not in self.graph.initializers:
            data = np.asarray(array, dtype)
            shape, tensor = ir.Shape(data.shape), ir.tensor(data, name=name)
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def insert_first(self) -> None:
        """Put the nodes at the start of the graph."""
        first = next(iter(self.graph))
        self.graph.insert_before(first, self.nodes)
