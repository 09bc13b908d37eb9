"""The plugin's function on ONNX Runtime against the weights that the packed bytes stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from cpm_edge.plugins.matmul_nbits.body import NAME, functions, only_zero
from cpm_edge.plugins.matmul_nbits.spans import pack_spans
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape


@pytest.mark.parametrize(
    ("cols", "bits", "group", "symmetric"),
    [
        (96, 4, 32, True),
        (192, 4, 64, False),
        (256, 4, 128, True),
        (96, 2, 32, True),
        (256, 2, 128, True),
        (48, 8, 0, True),
    ],
)
def test_products_of_packed_weights(cols: int, bits: int, group: int, symmetric: bool) -> None:
    rng = np.random.default_rng(cols + bits)
    shape = NBitsShape(11, cols, bits, group, symmetric)
    groups = cols // (group or cols)
    codes = rng.integers(0, 3 if bits == 2 else 1 << bits, (11, cols)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (11, groups)).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, 16, (11, groups)).astype(np.uint8)
    packed = pack_spans(shape, codes, scales, zeros)
    x = rng.standard_normal((1, 5, cols)).astype(np.float16)

    tensors: dict[str, npt.NDArray[Any]] = {"codes": packed.codes.view(np.int8), "scales": packed.scales}
    if packed.zeros is not None:
        tensors["zeros"] = packed.zeros.view(np.int8)
    values = [ir.Value(name=n, const_value=ir.tensor(t, name=n)) for n, t in tensors.items()]
    if symmetric:
        values.append(only_zero(bits))
    given = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT16))
    node = ir.Node("cpm", NAME, [given, *values], ir.convenience.convert_attributes(
        {"bits": bits, "group": group, "n": 11, "k": cols}), num_outputs=1)  # fmt: skip
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT16)
    graph = ir.Graph(
        [given], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21, "cpm": 1}, name="g"
    )
    model = ir.Model(graph, ir_version=10, functions=functions())
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    (got,) = session.run(["y"], {"x": x})

    centre = np.repeat(np.full((11, groups), shape.zero) if zeros is None else zeros, cols // groups, 1)
    weight = (codes.astype(np.float32) - centre) * np.repeat(scales.astype(np.float32), cols // groups, 1)
    np.testing.assert_allclose(got, x.astype(np.float32) @ weight.T, rtol=2e-3, atol=2e-3)
