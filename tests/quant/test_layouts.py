from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import openvino as ov
import pytest
from hypothesis import given
from onnx import numpy_helper
from openvino import opset13 as ops

from cpm_edge.quant import (
    QuantError,
    Quantized,
    Scheme,
    WeightFormat,
    matmulnbits,
    onnx_int4,
    openvino_i4,
    openvino_i8,
    openvino_u2,
    openvino_u4,
    quantize,
)

from .strategies import Floats, weights

INT4, INT8, TERNARY = WeightFormat.INT4, WeightFormat.INT8, WeightFormat.TERNARY


def sample(rows: int, cols: int, scheme: Scheme) -> Quantized:
    weight = np.random.default_rng(cols).standard_normal((rows, cols)).astype(np.float32)
    weight[1] = 0
    weight[2] = np.abs(weight[2])
    if scheme.format is TERNARY:
        groups = weight.reshape(rows, -1, scheme.group_size or cols)
        scale = np.float16(np.abs(groups).mean(axis=2, keepdims=True)).astype(np.float32)
        weight = (np.sign(groups) * (np.abs(groups) > scale / 2) * scale).reshape(rows, cols)
    return quantize(weight, scheme)


def run_matmulnbits(q: Quantized, block: int, activations: Floats) -> Floats:
    rows, cols = q.codes.shape
    laid = matmulnbits(q, block)
    weights_: dict[str, npt.NDArray[Any]] = {"B": laid.B, "scales": laid.scales}
    if laid.zero_points is not None:
        weights_["zero_points"] = laid.zero_points
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["A", *weights_],
        ["Y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=q.scheme.bits,
        block_size=block,
    )
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("A", onnx.TensorProto.FLOAT, ["M", cols])],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, ["M", rows])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights_.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"A": activations})[0])


@pytest.mark.parametrize(
    ("scheme", "cols", "block"),
    [
        (Scheme(INT4, 64), 576, 64),
        (Scheme(INT4, 64, symmetric=False), 576, 64),
        (Scheme(INT4, 128, symmetric=False), 384, 32),
        (Scheme(INT8), 576, 64),
        (Scheme(INT8), 100, 32),
        (Scheme(INT8, 32), 96, 32),
        (Scheme(TERNARY, 128), 384, 128),
        (Scheme(TERNARY, 256), 512, 64),
        (Scheme(TERNARY), 100, 32),
    ],
    ids=str,
)
def test_onnxruntime_reads_the_layout(scheme: Scheme, cols: int, block: int) -> None:
    q = sample(11, cols, scheme)
    expected = q.dequantize()
    # The identity reads every weight back; a single row takes the engine's other code path.
    assert np.allclose(run_matmulnbits(q, block, np.eye(cols, dtype=np.float32)), expected.T, atol=1e-6)
    row = np.random.default_rng(1).standard_normal((1, cols)).astype(np.float32)
    assert np.allclose(run_matmulnbits(q, block, row), row @ expected.T, atol=1e-3)


@given(weights(cols=96))
def test_matmulnbits_row_blocks_equal_the_whole(weight: Floats) -> None:
    for scheme in (Scheme(INT4, 32), Scheme(INT4, 32, symmetric=False), Scheme(INT8), Scheme(TERNARY, 32)):
        if scheme.format is TERNARY:
            weight = np.sign(weight)
        whole = matmulnbits(quantize(weight, scheme), 32)
        parts = [matmulnbits(quantize(weight[i : i + 2], scheme), 32) for i in range(0, len(weight), 2)]
        assert np.array_equal(np.concatenate([part.B for part in parts]), whole.B)
        assert np.array_equal(np.concatenate([part.scales for part in parts]), whole.scales)
        if whole.zero_points is not None:
            zeros = [part.zero_points for part in parts if part.zero_points is not None]
            assert np.array_equal(np.concatenate(zeros), whole.zero_points)


def test_matmulnbits_shapes_and_padding() -> None:
    laid = matmulnbits(sample(5, 100, Scheme(INT8)), 64)
    assert laid.B.shape == (5, 2, 64)
    assert laid.scales.shape == (10,)
    assert (laid.B[:, 1, 36:] == 128).all()
    asym = sample(3, 40, Scheme(INT4, 40, symmetric=False))
    with pytest.raises(QuantError, match="blocks of 16 columns do not fit into groups of 40"):
        matmulnbits(asym, 16)
    per_row = Quantized(asym.codes, asym.scales, asym.zeros, Scheme(INT4, None, symmetric=False))
    laid = matmulnbits(per_row, 16)
    assert laid.B.shape == (3, 3, 8)
    assert laid.zero_points is not None
    assert laid.zero_points.shape == (3 * 2,)
    assert per_row.zeros is not None
    assert np.array_equal(laid.B[:, 2, 4:], np.repeat(per_row.zeros * 17, 4, axis=1))


def test_matmulnbits_refuses_block_sizes_the_op_does_not_have() -> None:
    q = sample(3, 96, Scheme(INT4, 32))
    for block in (8, 48, 0):
        with pytest.raises(QuantError, match=f"power of two of at least 16, got {block}"):
            matmulnbits(q, block)
    with pytest.raises(QuantError, match="blocks of 64 columns do not fit into groups of 32"):
        matmulnbits(q, 64)


def constant(packed: np.ndarray, shape: tuple[int, ...], type_: ov.Type) -> ov.Node:
    tensor = ov.Tensor(type_, ov.Shape(shape))  # owns its memory: one made around an array does not keep it
    data = tensor.data.reshape(-1)
    data[:] = packed.reshape(-1).view(data.dtype)
    return ops.constant(tensor)


def weights_in_openvino(q: Quantized) -> Floats:
    """(code - zero) * scale computed by OpenVINO from the packed constants."""
    rows, cols = q.codes.shape
    grouped = (rows, q.scales.shape[1], q.group_width)
    zeros: ov.Node | None = None
    if q.scheme.format is INT8:
        codes = constant(openvino_i8(q), grouped, ov.Type.i8)
    elif q.scheme.format is TERNARY:
        codes = constant(openvino_u2(q), grouped, ov.Type.u2)
        zeros = ops.constant(np.float32(1))
    elif q.scheme.symmetric:
        codes = constant(openvino_i4(q), grouped, ov.Type.i4)
    else:
        packed, packed_zeros = openvino_u4(q)
        codes = constant(packed, grouped, ov.Type.u4)
        zeros = ops.convert(constant(packed_zeros, (*grouped[:2], 1), ov.Type.u4), "f32")
    values: ov.Node = ops.convert(codes, "f32")
    if zeros is not None:
        values = ops.subtract(values, zeros)
    values = ops.multiply(values, ops.constant(q.scales[:, :, None].astype(np.float16).astype(np.float32)))
    probe = ops.parameter(
        [1], np.float32
    )  # a model must have an input for its constants not to be the answer
    model = ov.Model([ops.add(values, probe)], [probe])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled([np.zeros(1, np.float32)])[0]).reshape(rows, cols)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(INT4, 64),
        Scheme(INT4, 64, symmetric=False),
        Scheme(INT8),
        Scheme(INT8, 64),
        Scheme(TERNARY, 64),
        Scheme(TERNARY),
    ],
    ids=Scheme.describe,
)
def test_openvino_reads_the_layout(scheme: Scheme) -> None:
    q = sample(7, 576, scheme)  # 7 rows of 9 groups: the zero points end within a byte
    assert np.allclose(weights_in_openvino(q), q.dequantize(), atol=1e-6)


def test_openvino_zero_points_run_on_across_rows() -> None:
    q = sample(3, 96, Scheme(INT4, 32, symmetric=False))
    assert q.zeros is not None
    flat = [*q.zeros.reshape(-1).tolist(), 0]
    assert openvino_u4(q)[1].tolist() == [
        low | high << 4 for low, high in zip(flat[::2], flat[1::2], strict=True)
    ]


def test_openvino_layouts_refuse_other_schemes() -> None:
    with pytest.raises(QuantError, match="expected symmetric int4, got int4 g32 asym"):
        openvino_i4(sample(3, 96, Scheme(INT4, 32, symmetric=False)))
    with pytest.raises(QuantError, match="expected asymmetric int4, got int4 g32 sym"):
        openvino_u4(sample(3, 96, Scheme(INT4, 32)))
    with pytest.raises(QuantError, match="expected symmetric int8, got int4 g32 sym"):
        openvino_i8(sample(3, 96, Scheme(INT4, 32)))
    with pytest.raises(QuantError, match="expected symmetric ternary, got int8 row sym"):
        openvino_u2(sample(3, 96, Scheme(INT8)))


@given(data=weights(cols=64))
def test_onnx_int4_is_what_onnx_unpacks(data: Floats) -> None:
    q = quantize(data, Scheme(INT4, 32))
    tensor = onnx.helper.make_tensor(
        "t", onnx.TensorProto.INT4, q.codes.shape, onnx_int4(q).tobytes(), raw=True
    )
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), q.codes.astype(np.int8) - 8)


def test_onnx_int4_of_ternary_weights() -> None:
    q = sample(5, 128, Scheme(TERNARY, 64))
    packed = onnx_int4(q)
    nibbles = np.stack([packed & 15, packed >> 4], 2).reshape(5, 128).astype(np.int8)
    np.testing.assert_array_equal(np.where(nibbles > 7, nibbles - 16, nibbles), q.codes.astype(np.int8) - 1)
    with pytest.raises(QuantError, match="ONNX INT4: expected symmetric int4, got int8 row sym"):
        onnx_int4(sample(3, 96, Scheme(INT8)))
