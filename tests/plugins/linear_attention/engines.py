"""The op's ONNX body, and the op of ONNX Runtime that has the same contract, on the engines that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
from onnx_ir.passes.common import InlinePass

from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.linear_attention.body import functions
from cpm_edge.plugins.linear_attention.spec import OP, LinearAttentionSpec
from tests.plugins.linear_attention.cases import Array, Op

INPUTS = ("query", "key", "value", "past_state")
OUTPUTS = ("output", "present_state")
Make = Callable[..., Op]


def one_node(spec: LinearAttentionSpec, size: int, value_size: int, opset: int = 21) -> ir.Model:
    """A graph of the op alone, its bodies as model functions; only B and T are dynamic."""
    heads = spec.num_heads
    inputs = [
        _value("query", ["batch", "rows", heads * size]),
        _value("key", ["batch", "rows", heads * size]),
    ]
    inputs.append(_value("value", ["batch", "rows", heads * value_size]))
    inputs.append(_value("past_state", ["batch", heads, size, value_size]))
    attributes = ir.convenience.convert_attributes(spec.attributes())
    node = ir.Node(DOMAIN, OP, inputs, attributes, num_outputs=2)
    imports = {"": opset, DOMAIN: VERSION}
    return _model(node, inputs, imports, functions(opset=opset))


def onnxruntime_body(spec: LinearAttentionSpec, size: int, value_size: int, **options: int) -> Op:
    """The body as a local function of ONNX Runtime."""
    session = _session(one_node(spec, size, value_size, **options))

    def run(*inputs: Array) -> Sequence[Array]:
        return list(session.run(OUTPUTS, _feeds(INPUTS, inputs)))

    return run


def openvino_body(spec: LinearAttentionSpec, size: int, value_size: int, **options: int) -> Op:
    """The body, inlined, on OpenVINO's CPU plugin."""
    model = one_node(spec, size, value_size, **options)
    InlinePass()(model)
    model.functions.clear()
    core = openvino.Core()
    converted = core.read_model(ir.serde.serialize_model(model).SerializeToString())
    compiled = core.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(*inputs: Array) -> Sequence[Array]:
        request.infer(_feeds(INPUTS, inputs))
        return [request.get_tensor(name).data.copy() for name in OUTPUTS]

    return run


def onnxruntime_op(spec: LinearAttentionSpec) -> Op:
    """com.microsoft LinearAttention, update_rule "gated", with our decay written out as (B, T, H)."""
    names = (*INPUTS, "decay")
    inputs = [_value(name, [None] * (4 if name == "past_state" else 3)) for name in names]
    attributes: dict[str, Any] = {
        "q_num_heads": spec.num_heads,
        "kv_num_heads": spec.num_heads,
        "update_rule": "gated",
        "scale": spec.scale,
    }
    node = ir.Node("com.microsoft", OP, inputs, ir.convenience.convert_attributes(attributes), num_outputs=2)
    session = _session(_model(node, inputs, {"": 21, "com.microsoft": 1}, []))

    def run(*tensors: Array) -> Sequence[Array]:
        batch, rows, _ = tensors[0].shape
        decay = np.broadcast_to(np.asarray(spec.decay, np.float32), (batch, rows, spec.num_heads))
        return list(session.run(OUTPUTS, _feeds(names, (*tensors, decay))))

    return run


def _value(name: str, shape: Sequence[int | str | None]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def _model(
    node: ir.Node, inputs: list[ir.Value], imports: dict[str, int], bodies: list[ir.Function]
) -> ir.Model:
    for value, name in zip(node.outputs, OUTPUTS, strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, list(node.outputs), nodes=[node], opset_imports=imports, name="op")
    return ir.Model(graph, ir_version=10, functions=bodies)


def _session(model: ir.Model) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    serialized = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(serialized, settings, providers=["CPUExecutionProvider"])


def _feeds(names: Sequence[str], arrays: Sequence[Array]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array) for name, array in zip(names, arrays, strict=True)}
