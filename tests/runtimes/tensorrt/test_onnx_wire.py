"""The reader of protobuf bytes against the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.onnx_wire import ExternalTensor, external_tensors, uses, with_inputs

KINDS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.INT8: 8,
    TensorProto.INT4: 4,
}
TENSORS = st.tuples(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.integers(1, 70_000), min_size=1, max_size=4),
    st.integers(0, 1 << 40),
    st.booleans(),
)


def model_of(tensors: list[tuple[int, list[int], int, bool]]) -> onnx.ModelProto:
    initializers = []
    for index, (kind, dims, offset, external) in enumerate(tensors):
        tensor = TensorProto(name=f"w{index}", data_type=kind, dims=dims)
        if external:
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": "model.onnx.data", "offset": str(offset)}.items():
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
        initializers.append(tensor)
    nodes = [
        helper.make_node("CpmMatMulNBits", ["x", f"w{i}"], [f"y{i}"], domain="cpm")
        for i in range(len(tensors))
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, "T", 8])
    graph = helper.make_graph(nodes, "g", [x], [], initializers, doc_string="ä")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], producer_name="p")


@settings(max_examples=60, deadline=None)
@given(st.lists(TENSORS, max_size=5), st.sets(st.integers(0, 4)))
def test_chosen_initializers_become_inputs_and_nothing_else_changes(
    tensors: list[tuple[int, list[int], int, bool]], chosen: set[int]
) -> None:
    model = model_of(tensors)
    data = model.SerializeToString()
    expected = [
        ExternalTensor(
            f"w{i}",
            kind,
            tuple(dims),
            "model.onnx.data",
            offset,
            -(-int(np.prod(dims, dtype=object)) * KINDS[kind] // 8),
        )
        for i, (kind, dims, offset, external) in enumerate(tensors)
        if external
    ]
    assert external_tensors(data) == expected
    assert [use.name for use in uses(data)] == [n for i in range(len(tensors)) for n in ("x", f"w{i}")]
    assert all((use.op_type, use.domain) == ("CpmMatMulNBits", "cpm") for use in uses(data))

    names = {f"w{i}" for i in chosen}
    got = onnx.load_model_from_string(with_inputs(data, names.__contains__))
    moved = [tensor for tensor in model.graph.initializer if tensor.name in names and tensor.external_data]
    kept = [tensor for tensor in model.graph.initializer if tensor not in moved]
    for tensor in moved:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    assert got == model


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_damaged_bytes_are_refused(cut: int) -> None:
    data = model_of([(TensorProto.FLOAT16, [4], 0, True)]).SerializeToString()
    with pytest.raises(BundleError, match="ONNX model"):
        external_tensors(data[:-cut])


def test_bytes_without_a_graph_are_refused() -> None:
    with pytest.raises(BundleError, match="expected one graph, found 0"):
        uses(b"")
