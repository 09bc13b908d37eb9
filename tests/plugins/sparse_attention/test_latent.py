"""The latent form: values that are columns of the keys, in one cache for all heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
import torch
from onnx_ir.passes.common import InlinePass

from cpm_edge.exporter.ops.sparse_attention import sparse_attention as torch_op
from cpm_edge.plugins import DOMAIN, VERSION
from cpm_edge.plugins.sparse_attention.latent_body import latent_functions
from cpm_edge.plugins.sparse_attention.reference import sparse_attention
from cpm_edge.plugins.sparse_attention.spec import OP, SparseAttentionSpec
from tests.plugins.sparse_attention.cases import Array

# query, key, key_cache, past_length -> output, present_key
Op = Callable[[Array, Array, Array, Array], Sequence[Array]]

INPUTS = ("query", "key", "key_cache", "past_length")
OUTPUTS = ("output", "present_key")
SPEC = SparseAttentionSpec.latent(num_heads=5, scale=18**-0.5, v_head_size=12)
SIZE = 20
CHUNKS = (1, 30, 33, 1, 17, 1)


def make_rows(count: int, batch: int = 1, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((batch, count, SPEC.num_heads * SIZE), np.float32)
    return 1.5 * query, rng.standard_normal((batch, count, SIZE), np.float32)


def reference_op(query: Array, key: Array, key_cache: Array, past_length: Array) -> Sequence[Array]:
    return sparse_attention(query, key, None, key_cache, None, past_length, spec=SPEC)


def eager_op(*inputs: Array) -> Sequence[Array]:
    query, key, cache, past = (torch.from_numpy(array) for array in inputs)
    return [t.numpy() for t in torch_op(query, key, None, cache, None, past, spec=SPEC)]


def one_node(*, grow: bool, opset: int = 21) -> ir.Model:
    shapes: dict[str, list[int | str]] = {
        "query": ["batch", "rows", SPEC.num_heads * SIZE],
        "key": ["batch", "rows", SIZE],
        "key_cache": ["batch", 1, "capacity", SIZE],
        "past_length": ["batch"],
    }
    values = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.INT64 if name == "past_length" else ir.DataType.FLOAT),
        )
        for name, shape in shapes.items()
    }
    inputs = [values["query"], values["key"], None, values["key_cache"], None, values["past_length"]]
    node = ir.Node(DOMAIN, OP, inputs, ir.convenience.convert_attributes(SPEC.attributes()), num_outputs=2)
    for value, name in zip(node.outputs, OUTPUTS, strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    imports = {"": opset, DOMAIN: VERSION}
    graph = ir.Graph(
        list(values.values()), list(node.outputs), nodes=[node], opset_imports=imports, name="op"
    )
    return ir.Model(graph, ir_version=10, functions=latent_functions(grow=grow, opset=opset))


def onnxruntime_op(**options: Any) -> Op:
    model = ir.serde.serialize_model(one_node(grow=False, **options)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda *inputs: list(session.run(OUTPUTS, dict(zip(INPUTS, inputs, strict=True))))


def openvino_op(**options: Any) -> Op:
    model = one_node(grow=True, **options)
    InlinePass()(model)
    model.functions.clear()
    core = openvino.Core()
    converted = core.read_model(ir.serde.serialize_model(model).SerializeToString())
    request = core.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(*inputs: Array) -> Sequence[Array]:
        request.infer(dict(zip(INPUTS, inputs, strict=True)))
        return [request.get_tensor(name).data.copy() for name in OUTPUTS]

    return run


def feed(op: Op, query: Array, key: Array, chunks: Sequence[int], *, grow: bool = False) -> Array:
    cache = np.zeros((len(query), 1, 0 if grow else query.shape[1] + 7, SIZE), np.float32)
    outputs, start = [], 0
    for size in chunks:
        past = np.full(len(query), start, np.int64)
        rows = slice(start, start + size)
        output, cache = op(query[:, rows], key[:, rows], np.ascontiguousarray(cache), past)
        outputs.append(np.array(output))
        start += size
    np.testing.assert_array_equal(cache[:, 0, :start], key)
    return np.concatenate(outputs, 1)


def test_the_reference_is_attention_whose_values_are_columns_of_the_keys() -> None:
    """Against the ordinary form of the op, which was given those columns, padded, as values."""
    query, key = make_rows(40)
    plain = SparseAttentionSpec.dense(SPEC.num_heads, 1, SPEC.scale)
    cache = np.zeros((1, 1, 64, SIZE), np.float32)
    past = np.zeros(1, np.int64)
    padded = np.where(np.arange(SIZE) < SPEC.v_head_size, key, 0)
    expected, *_ = sparse_attention(query, key, padded, cache, cache, past, spec=plain)
    output, present = reference_op(query, key, cache, past)
    wide = expected.reshape(1, 40, SPEC.num_heads, SIZE)[..., : SPEC.v_head_size]
    np.testing.assert_allclose(output, wide.reshape(1, 40, -1), atol=1e-6)
    np.testing.assert_array_equal(present[:, 0, :40], key)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("op", "grow"),
    [(eager_op, False), (onnxruntime_op(), False), (openvino_op(), True)],
    ids=["torch", "onnxruntime", "openvino"],
)
def test_chunks_and_single_steps(op: Op, grow: bool, batch: int) -> None:
    query, key = make_rows(sum(CHUNKS), batch)
    expected = feed(reference_op, query, key, CHUNKS)
    assert expected.std() > 0.2
    np.testing.assert_allclose(feed(op, query, key, CHUNKS, grow=grow), expected, atol=5e-6)
    np.testing.assert_allclose(feed(op, query, key, [sum(CHUNKS)], grow=grow), expected, atol=5e-6)


@pytest.mark.parametrize(("make", "grow"), [(onnxruntime_op, False), (openvino_op, True)])
@pytest.mark.parametrize("opset", [22, 23])
def test_the_opsets_of_our_targets(make: Callable[..., Op], grow: bool, opset: int) -> None:
    query, key = make_rows(40)
    got = feed(make(opset=opset), query, key, [39, 1], grow=grow)
    np.testing.assert_allclose(got, feed(reference_op, query, key, [40]), atol=5e-6)


def test_rows_of_a_batch_may_have_different_lengths() -> None:
    query, key = make_rows(6, batch=2)
    cache = np.random.default_rng(1).standard_normal((2, 1, 50, SIZE)).astype(np.float32)
    inputs = (query, key, cache, np.array([3, 40]))
    for expected, got in zip(reference_op(*inputs), onnxruntime_op()(*inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)


def test_garbage_behind_the_valid_rows_does_not_matter() -> None:
    query, key = make_rows(30)
    past = np.zeros(1, np.int64)
    clean, dirty = (np.full((1, 1, 64, SIZE), fill, np.float32) for fill in (0, np.nan))
    run = onnxruntime_op()
    np.testing.assert_array_equal(run(query, key, dirty, past)[0], run(query, key, clean, past)[0])
