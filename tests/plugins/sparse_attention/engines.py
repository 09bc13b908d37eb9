"""The op's ONNX bodies on the engines that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
from onnx_ir.passes.common import InlinePass

from cpm_edge.exporter.passes.openvino_state import stable_topk
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.sparse_attention.body import functions
from cpm_edge.plugins.sparse_attention.spec import OP, SparseAttentionSpec
from tests.plugins.sparse_attention.cases import SIZE, Array

INPUTS = ("query", "key", "value", "key_cache", "value_cache", "past_length")
OUTPUTS = ("output", "present_key", "present_value")
Run = Callable[..., Sequence[Array]]


def one_node(spec: SparseAttentionSpec, *, grow: bool, size: int = SIZE, opset: int = 21) -> ir.Model:
    """A graph of the op alone, its bodies as model functions."""
    rows = {
        "query": spec.num_heads * size,
        "key": spec.kv_num_heads * size,
        "value": spec.kv_num_heads * size,
    }
    inputs = []
    for name in INPUTS:
        dtype = ir.DataType.FLOAT
        shape: list[int | str] = ["batch", spec.kv_num_heads, "capacity", size]
        if name in rows:
            shape = ["batch", "rows", rows[name]]
        elif name == "past_length":
            dtype, shape = ir.DataType.INT64, ["batch"]
        inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))
    node = ir.Node(DOMAIN, OP, inputs, ir.convenience.convert_attributes(spec.attributes()), num_outputs=3)
    for value, name in zip(node.outputs, OUTPUTS, strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    imports = {"": opset, DOMAIN: VERSION}
    graph = ir.Graph(inputs, list(node.outputs), nodes=[node], opset_imports=imports, name="op")
    return ir.Model(graph, ir_version=10, functions=functions(grow=grow, opset=opset))


def onnxruntime_op(spec: SparseAttentionSpec, **options: Any) -> Run:
    """The scatter form on ONNX Runtime."""
    model = ir.serde.serialize_model(one_node(spec, grow=False, **options)).SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def run(*inputs: Array) -> Sequence[Array]:
        feeds = {n: np.ascontiguousarray(a) for n, a in zip(INPUTS, inputs, strict=True)}
        return list(session.run(OUTPUTS, feeds))

    return run


def openvino_op(spec: SparseAttentionSpec, **options: Any) -> Run:
    """The grow form, inlined, on OpenVINO's CPU plugin with the stable TopK of our bundles."""
    model = one_node(spec, grow=True, **options)
    InlinePass()(model)
    model.functions.clear()
    core = openvino.Core()
    converted = core.read_model(ir.serde.serialize_model(model).SerializeToString())
    stable_topk(converted)
    compiled = core.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def run(*inputs: Array) -> Sequence[Array]:
        feeds = {n: np.ascontiguousarray(a) for n, a in zip(INPUTS, inputs, strict=True)}
        request.infer(feeds)
        return [request.get_tensor(name).data.copy() for name in OUTPUTS]

    return run
