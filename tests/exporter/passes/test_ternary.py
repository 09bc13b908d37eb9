"""Ternary checkpoints arrive in every target as they are: equal integers, equal scales, few bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from cpm_edge.plugins.matmul_nbits import reference
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from tests.support.bundles import Bundles
from tests.support.checkpoints import TERNARY, TERNARY_WIDE, Tensors, linear_names, tensors_of
from tests.support.stored import constants, panel_formats

Bytes = npt.NDArray[np.uint8]

OPTIONS: dict[str, Any] = {"weight_format": "ternary"}
EMPTY_GROUP = 2.0**-14  # stored for a group of zeros: any scale gives zeros back
GGUF = ("gguf-tq1_0", "gguf-tq2_0")
for_variants = pytest.mark.parametrize("variant", [*TERNARY, TERNARY_WIDE, *GGUF])


def signs(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    return np.sign(weight).astype(np.int8)


def scales_of(weight: npt.NDArray[np.float32], group: int) -> npt.NDArray[np.float32]:
    """The magnitude of each group (rows, groups), as the checkpoint has it."""
    peaks = np.abs(weight).reshape(len(weight), -1, group).max(axis=2)
    return np.where(peaks == 0, np.float32(EMPTY_GROUP), peaks)


def quarters(packed: Bytes) -> npt.NDArray[np.int8]:
    """Four codes a byte, the first in the lowest bits."""
    codes = np.stack([packed >> np.uint8(2 * place) & np.uint8(3) for place in range(4)], axis=-1)
    return codes.reshape(len(packed), -1).astype(np.int8)


@for_variants
def test_matmul_nbits_holds_the_checkpoint(bundles: Bundles, variant: str) -> None:
    graph = ir.load(bundles.open(variant, "ort", **OPTIONS).file("model.onnx")).graph
    nodes = {node.inputs[1].name: node for node in graph if node.op_type == "MatMulNBits" and node.inputs[1]}
    tensors = tensors_of(variant)
    for name in linear_names(tensors):
        node, rows = nodes[f"{name}.codes"], len(tensors[name])
        block = node.attributes.get_int("block_size")
        assert node.attributes.get_int("bits") == 2 and block in (32, 64, 128)
        # No zero points are stored: those of the operator are 2.
        assert len(node.inputs) == 3
        codes, scales = (graph.initializers[f"{name}.{part}"].const_value for part in ("codes", "scales"))
        assert codes is not None and scales is not None
        np.testing.assert_array_equal(quarters(codes.numpy().reshape(rows, -1)) - 2, signs(tensors[name]))
        np.testing.assert_array_equal(scales.numpy().reshape(rows, -1), scales_of(tensors[name], block))


@for_variants
def test_u2_constants_hold_the_checkpoint(bundles: Bundles, variant: str) -> None:
    stored = constants(bundles.open(variant, "aipc", **OPTIONS).file("openvino_model.xml"))
    tensors = tensors_of(variant)
    for name in linear_names(tensors):
        kind, shape, codes = stored[f"{name}.codes"]
        rows, cols = tensors[name].shape
        assert kind == "u2" and int(np.prod(shape)) == rows * cols
        np.testing.assert_array_equal(quarters(codes.reshape(rows, -1)) - 1, signs(tensors[name]))
        kind, shape, scales = stored[f"{name}.scales"]
        wide = variant == TERNARY_WIDE
        assert kind == ("f32" if wide else "f16")
        expected = scales_of(tensors[name], cols // shape[1])
        dtype = np.float32 if wide else np.float16
        np.testing.assert_array_equal(scales.view(dtype).reshape(rows, -1), expected)


@for_variants
def test_openvino_multiplies_two_bits(bundles: Bundles, variant: str) -> None:
    """The CPU plugin keeps the codes packed instead of compiling the layers into floats."""
    engine: Any = bundles.engine(variant, "aipc", **OPTIONS)
    layers = []
    for node in engine.compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) == "FullyConnected":
            layers.append((node.get_friendly_name(), info["runtimePrecision"].astype(str)))
    assert [precision for _, precision in layers].count("u2") == 14, layers


@pytest.mark.parametrize("variant", [*TERNARY, *GGUF])
def test_native_panels_hold_the_checkpoint(bundles: Bundles, variant: str) -> None:
    path = bundles.open(variant, "aipc", **OPTIONS, flavour="native").file("openvino_native.xml")
    formats = panel_formats(path)
    tensors, seen = tensors_of(variant), []
    for panels, (kind, _, data) in constants(path).items():
        names = panels.removesuffix(".panels").split("+")
        if names[0] not in linear_names(tensors):
            continue
        assert kind == "u8"
        weight = np.concatenate([tensors[name] for name in names])
        rows, cols = weight.shape
        shape = NBitsShape(rows, cols, 2, formats[panels].group)
        codes = (signs(weight) + 1).astype(np.uint8)
        scales = scales_of(weight, shape.group_cols).astype(np.float16)
        np.testing.assert_array_equal(data, reference.pack(shape, codes, scales, None).reshape(-1))
        seen += names
    assert sorted(seen) == sorted(linear_names(tensors))


def bytes_of(tensors: Tensors) -> int:
    """What bfloat16 takes."""
    return sum(2 * tensors[name].size for name in linear_names(tensors))


@pytest.mark.parametrize(
    ("target", "options", "bits"),
    [("ort", {}, 2 + 32 / 128), ("aipc", {}, 2 + 16 / 128), ("aipc", {"flavour": "native"}, 2 + 16 / 128)],
    ids=["ort", "stock", "native"],
)
def test_bytes_of_the_linear_layers(
    bundles: Bundles, target: str, options: dict[str, Any], bits: float
) -> None:
    """Exactly two bits a weight and a scale a group of 128: 14.06 % of bfloat16 in ort, 13.28 % in aipc."""
    weights = bundles.open("ternary", target, **OPTIONS, **options).manifest.weights
    share = weights["linear_bytes"] / bytes_of(tensors_of("ternary"))
    assert share == bits / 16
    assert share <= (0.143 if target == "ort" else 0.135)
