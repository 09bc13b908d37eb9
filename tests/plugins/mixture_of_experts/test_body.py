"""The ONNX function body against the reference, on both engines that run it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
from onnx_ir.passes.common import InlinePass

from cpm_edge.exporter.passes.openvino_state import stable_topk
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.mixture_of_experts.body import functions
from cpm_edge.plugins.mixture_of_experts.spec import OP
from tests.plugins.mixture_of_experts.cases import Array, Case, make_case

Run = Callable[[Array, Array], Array]


def one_node(case: Case, opset: int = 21) -> ir.Model:
    """A graph of the op alone, its weights as initializers."""
    x, logits = (
        _value("x", ["batch", "rows", case.x.shape[2]]),
        _value("logits", ["batch", "rows", case.spec.num_experts]),
    )
    weights = [_value(f"w{i}", w.shape, w) for i, w in enumerate(w for part in case.weights for w in part)]
    attributes = ir.convenience.convert_attributes(case.spec.attributes())
    node = ir.Node(DOMAIN, OP, [x, logits, *weights], attributes, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": opset, DOMAIN: VERSION}
    graph = ir.Graph(
        [x, logits], list(node.outputs), nodes=[node], initializers=weights, opset_imports=imports, name="op"
    )
    return ir.Model(graph, ir_version=10, functions=functions(case.spec, opset=opset))


def _value(name: str, shape: object, data: Array | None = None) -> ir.Value:
    tensor = None if data is None else ir.tensor(data, name=name)
    kind = ir.TensorType(ir.DataType.FLOAT)
    return ir.Value(name=name, shape=ir.Shape(shape), type=kind, const_value=tensor)  # type: ignore[arg-type]


def onnxruntime_body(case: Case, opset: int = 21) -> Run:
    model = ir.serde.serialize_model(one_node(case, opset)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda x, logits: np.asarray(session.run(["y"], {"x": x, "logits": logits})[0])


def openvino_body(case: Case, opset: int = 21) -> Run:
    model = one_node(case, opset)
    InlinePass()(model)
    model.functions.clear()
    core = openvino.Core()
    converted = core.read_model(ir.serde.serialize_model(model).SerializeToString())
    stable_topk(converted)  # as the export does: OpenVINO leaves the order of ties open
    request = core.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(x: Array, logits: Array) -> Array:
        request.infer({"x": x, "logits": logits})
        return np.array(request.get_tensor("y").data)

    return run


ENGINES = pytest.mark.parametrize("make", [onnxruntime_body, openvino_body], ids=["onnxruntime", "openvino"])


@ENGINES
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 3), (3, 3)])
def test_odd_lengths(make: Callable[..., Run], experts: int, top_k: int) -> None:
    """One compiled model for every length and batch size; experts without tokens among them."""
    run = make(make_case(experts, top_k, 1))
    for rows, batch in ((1, 1), (2, 2), (7, 1), (65, 1)):
        case = make_case(experts, top_k, rows, batch=batch)
        tokens = make_case(experts, top_k, rows, batch=batch, seed=3)
        case = Case(case.spec, tokens.x, tokens.logits, *make_case(experts, top_k, 1).weights)
        np.testing.assert_allclose(run(case.x, case.logits), case.expected(), atol=2e-6)


@ENGINES
@pytest.mark.parametrize("opset", [21, 22, 23])
def test_the_opsets_of_our_targets(make: Callable[..., Run], opset: int) -> None:
    case = make_case(4, 2, 9)
    run = make(case, opset=opset)
    np.testing.assert_allclose(run(case.x, case.logits), case.expected(), atol=2e-6)


def test_the_weights_of_other_experts_are_not_touched() -> None:
    """NaN in them would show."""
    case = make_case(6, 2, 1)
    (chosen,) = np.nonzero(case.shares()[0, 0])
    expected = case.expected()
    for expert in set(range(6)) - set(chosen.tolist()):
        for part in case.weights:
            part[expert][...] = np.nan
    np.testing.assert_allclose(onnxruntime_body(case)(case.x, case.logits), expected, atol=2e-6)
