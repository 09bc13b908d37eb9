from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.column_order import gather_before_norms, gather_columns
from cpm_edge.quant import TensorClass

REVERSED = np.arange(8)[::-1].astype(np.int64)
ROTATED = np.roll(np.arange(8), 1)


def norm_and_products(names: list[str]) -> ir.Graph:
    """RMSNormalization of x by ``norm``, then a product with each of the named weights."""
    x = ir.Value(name="x", shape=ir.Shape(["t", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [ir.Value(name=name, shape=ir.Shape([4, 8])) for name in names]
    scale = ir.Value(name="norm", shape=ir.Shape([8]))
    graph = ir.Graph([x], [], nodes=[], initializers=[scale, *weights], opset_imports={"": 23})
    builder = Builder(graph)
    normed = builder.op("RMSNormalization", [x, scale], {"axis": -1}, name="normed")
    for weight in weights:
        turned = builder.op("Transpose", [weight], name=f"{weight.name}.t")
        graph.outputs.append(builder.op("MatMul", [normed, turned], name=f"{weight.name}.product"))
    graph.extend(builder.nodes)
    return graph


def orders(**found: Any) -> Any:
    return SimpleNamespace(
        own=set(found),
        column_order=found.get,
        names=lambda: list(found),
        kind=lambda name: TensorClass.LINEAR,
    )


def kinds(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph if node.op_type != "Transpose"]


def test_products_with_one_order_share_a_gather() -> None:
    graph = norm_and_products(["q", "k", "plain"])
    assert gather_columns(graph, orders(q=REVERSED, k=REVERSED)) == 1
    assert kinds(graph) == ["RMSNormalization", "Gather", "MatMul", "MatMul", "MatMul"]
    gather = next(node for node in graph if node.op_type == "Gather")
    readers = {node.name for node, _ in gather.outputs[0].uses()}
    assert readers == {"q.product", "k.product"}
    assert gather.inputs[1] is not None and gather.inputs[1].const_value is not None
    np.testing.assert_array_equal(gather.inputs[1].const_value.numpy(), REVERSED)


def test_an_order_that_no_product_reads_is_refused() -> None:
    graph = norm_and_products(["q"])
    with pytest.raises(ExportError, match="tensor expert: its columns are in act order") as caught:
        gather_columns(graph, orders(q=REVERSED, expert=ROTATED))
    assert "desc_act false" in (caught.value.hint or "")


def test_a_gather_moves_in_front_of_its_normalization() -> None:
    graph = norm_and_products(["q", "k"])
    gather_columns(graph, orders(q=REVERSED, k=REVERSED))
    gather_before_norms(graph)
    assert kinds(graph) == ["Gather", "Gather", "RMSNormalization", "MatMul", "MatMul"]
    norm = next(node for node in graph if node.op_type == "RMSNormalization")
    sources = [value.producer() for value in norm.inputs if value is not None]
    assert [node.inputs[0].name for node in sources if node and node.inputs[0]] == ["x", "norm"]


@pytest.mark.parametrize("found", [{"q": REVERSED, "k": ROTATED}, {"q": REVERSED}])
def test_a_normalization_that_is_read_in_several_orders_is_refused(found: dict[str, Any]) -> None:
    graph = norm_and_products(["q", "k"])
    gather_columns(graph, orders(**found))
    with pytest.raises(ExportError, match="different column orders"):
        gather_before_norms(graph)


def test_other_gathers_stay() -> None:
    graph = norm_and_products(["q"])
    norm = next(node for node in graph if node.op_type == "RMSNormalization")
    builder = Builder(graph)
    builder.op("Gather", [norm.outputs[0], builder.constant("last", [-1])], {"axis": 1}, name="rows")
    graph.extend(builder.nodes)
    gather_before_norms(graph)
    assert kinds(graph) == ["RMSNormalization", "MatMul", "Gather"]
