"""Integers of GPTQ, AWQ, Marlin, GGUF and trained checkpoints arrive in every target as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from cpm_edge.exporter.export import export
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.weights import tensor_class
from cpm_edge.plugins.matmul_nbits import reference
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.quant import TensorClass, quantize_int8
from tests.support.bundles import Bundles
from tests.support.checkpoints import (
    config_of,
    gguf_of,
    linear_names,
    make_tensors,
    packed_of,
    stored_of,
    tensors_of,
    trained_of,
    write_checkpoint,
)
from tests.support.packed import PACKINGS, WIDE, Int4, Packing, pack, quantized
from tests.support.qat import QAT_WIDE, QATS
from tests.support.stored import PanelFormat, constants, nibbles, panel_formats

pytestmark = pytest.mark.filterwarnings("ignore:2 linear layers are stored as Q6_K")

LINEAR = TensorClass.LINEAR
OPTIONS: dict[str, Any] = {"weight_format": "auto"}
PLAIN = OPTIONS | {"embedding_format": "fp32", "head_format": "fp32"}
# With the number of matrices that keep their integers, of 14.
VARIANTS = {variant: 10 if packing.floats else 14 for variant, packing in PACKINGS.items()}
VARIANTS |= {variant: 10 if training.floats else 14 for variant, training in QATS.items()}
VARIANTS |= {"gguf-q4_0": 14, "gguf-q4_1-zeros": 14, "gguf-q8_0": 14, "gguf-mixed": 12}
VARIANTS |= {"llama-gguf-q4_0": 14, "minicpm3-gguf-q4_0": 14}
# float16 does not hold their scales, or the flavour does not have their attention.
NOT_NATIVE = (WIDE, QAT_WIDE, "minicpm3-gguf-q4_0")
for_variants = pytest.mark.parametrize("variant", VARIANTS)


def matrices_of(variant: str) -> dict[str, Int4]:
    """The linear layers whose integers are to arrive."""
    if variant in PACKINGS:
        return packed_of(variant)
    if variant in QATS:
        return trained_of(variant)
    blocks = {name: b.integers for name, b in gguf_of(variant).items()}
    return {name: m for name, m in blocks.items() if m is not None and tensor_class(name, 2) is LINEAR}


def is_bytes(matrix: Int4) -> bool:
    return bool(matrix.zeros.max() == 128)


def is_symmetric(matrix: Int4) -> bool:
    return bool(np.isin(matrix.zeros, (8, 128)).all())


def grouped(values: npt.NDArray[Any], groups: int) -> npt.NDArray[Any]:
    """Values of the checkpoint's groups, repeated for each of the smaller groups that they are split into."""
    return np.repeat(values, groups // values.shape[1], axis=1)


def check_scales(variant: str, got: npt.NDArray[Any], expected: npt.NDArray[np.float32]) -> None:
    """Equal, but for float32 scales of training: rounding to bfloat16 left an interval of them."""
    np.testing.assert_allclose(got, expected, rtol=2.0**-8 if variant == QAT_WIDE else 0, atol=0)


def data(graph: ir.Graph, value: ir.Value | None) -> npt.NDArray[Any]:
    assert value is not None and value.name is not None
    tensor = graph.initializers[value.name].const_value
    assert tensor is not None
    return tensor.numpy()


@for_variants
def test_matmul_nbits_holds_the_checkpoint(bundles: Bundles, variant: str) -> None:
    graph = ir.load(bundles.open(variant, "ort", **PLAIN).file("model.onnx")).graph
    nodes = {node.inputs[1].name: node for node in graph if node.op_type == "MatMulNBits" and node.inputs[1]}
    matrices = matrices_of(variant)
    assert len(matrices) == VARIANTS[variant]
    for name, matrix in matrices.items():
        node, stored = nodes[f"{name}.codes"], matrix.sorted()
        rows, cols = stored.codes.shape
        groups = cols // node.attributes.get_int("block_size")
        codes = data(graph, node.inputs[1]).reshape(rows, -1)
        assert node.attributes.get_int("bits") == (8 if is_bytes(matrix) else 4)
        np.testing.assert_array_equal(codes if is_bytes(matrix) else nibbles(codes), stored.codes)
        scales = data(graph, node.inputs[2]).reshape(rows, -1)
        check_scales(variant, scales, grouped(stored.scales, groups))
        if is_symmetric(matrix):
            assert len(node.inputs) == 3
        else:
            zeros = nibbles(data(graph, node.inputs[3]).reshape(rows, -1))[:, :groups]
            np.testing.assert_array_equal(zeros, grouped(stored.zeros, groups))
        order = np.argsort(matrix.g_idx, kind="stable")
        gather = node.inputs[0].producer() if node.inputs[0] is not None else None
        if variant in PACKINGS and PACKINGS[variant].act_order:
            assert gather is not None and gather.op_type == "Gather"
            np.testing.assert_array_equal(data(graph, gather.inputs[1]), order)
        else:
            assert gather is None or gather.op_type != "Gather"


@for_variants
def test_openvino_constants_hold_the_checkpoint(bundles: Bundles, variant: str) -> None:
    stored = constants(bundles.open(variant, "aipc", **PLAIN, kv_cache="fp32").file("openvino_model.xml"))
    for name, matrix in matrices_of(variant).items():
        sorted_ = matrix.sorted()
        rows, cols = sorted_.codes.shape
        kind, shape, codes = stored[f"{name}.codes"]
        groups = int(np.prod(shape[1:-1]))  # one has no axis
        assert [rows, groups * shape[-1]] == [shape[0], cols]
        assert kind == ("i8" if is_bytes(matrix) else "i4" if is_symmetric(matrix) else "u4")
        # i4 and i8 are two's complement: the top bit of each code is the other way round.
        codes = (codes ^ np.uint8({"i8": 0x80, "i4": 0x88, "u4": 0}[kind])).reshape(rows, -1)
        np.testing.assert_array_equal(codes if is_bytes(matrix) else nibbles(codes), sorted_.codes)
        kind, _, scales = stored[f"{name}.scales"]
        assert kind == ("f32" if variant in (WIDE, QAT_WIDE) else "f16")
        values = scales.view(np.float32 if variant in (WIDE, QAT_WIDE) else np.float16).reshape(rows, -1)
        check_scales(variant, values, grouped(sorted_.scales, groups))
        if not is_symmetric(matrix):
            _, _, zeros = stored[f"{name}.zeros"]
            values = nibbles(zeros.reshape(1, -1)).reshape(-1)[: rows * groups].reshape(rows, -1)
            np.testing.assert_array_equal(values, grouped(sorted_.zeros, groups))


def panels_of(matrices: list[Int4], form: PanelFormat) -> npt.NDArray[np.uint8]:
    """The matrices as one, in the reference's own packing; with 8 bits as code - zero + 128."""
    rows, cols = sum(len(matrix.codes) for matrix in matrices), matrices[0].codes.shape[1]
    shape = NBitsShape(rows, cols, form.bits, form.group, form.symmetric)
    codes = [matrix.codes for matrix in matrices]
    if form.bits == 8:
        codes = [m.codes - m.zeros[:, m.g_idx] + np.uint8(128) for m in matrices]
    scales = np.concatenate([grouped(matrix.scales, shape.groups) for matrix in matrices])
    zeros = np.concatenate([grouped(matrix.zeros, shape.groups) for matrix in matrices])
    packed = reference.pack(
        shape, np.concatenate(codes), scales.astype(np.float16), None if form.symmetric else zeros
    )
    return packed.reshape(-1)


def rounded(weight: npt.NDArray[np.float32]) -> Int4:
    """A matrix whose integers do not arrive, as int8 with a scale a row."""
    q = quantize_int8(weight)
    zeros = np.full(q.scales.shape, 128, np.uint8)
    return Int4(q.codes, zeros, q.scales, np.zeros(weight.shape[1], np.int32))


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in NOT_NATIVE])
def test_native_panels_hold_the_checkpoint(bundles: Bundles, variant: str) -> None:
    path = bundles.open(variant, "aipc", **OPTIONS, flavour="native").file("openvino_native.xml")
    formats, tensors, matrices = panel_formats(path), tensors_of(variant), matrices_of(variant)
    seen = []
    for panels, (_, _, stored) in constants(path).items():
        names = panels.removesuffix(".panels").split("+")
        if names[0] not in linear_names(tensors):
            continue
        expected = [matrices[name].sorted() if name in matrices else rounded(tensors[name]) for name in names]
        np.testing.assert_array_equal(stored, panels_of(expected, formats[panels]))
        seen += names
    assert sorted(seen) == sorted(linear_names(tensors))
    qkv = next(form for name, form in formats.items() if "q_proj" in name)
    assert qkv.bits == (
        4 if all(name in matrices and not is_bytes(matrices[name]) for name in names_of_qkv()) else 8
    )


def names_of_qkv() -> list[str]:
    return [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]


def test_products_of_one_input_share_its_order(bundles: Bundles) -> None:
    """Four Gathers a layer: for q, k and v, for o, for gate and up, and for down."""
    variant = "gptq-act-order"
    graph = ir.load(bundles.open(variant, "ort", **PLAIN).file("model.onnx")).graph
    gathers = [
        node for node in graph if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == -1
    ]
    assert len(gathers) == 4 * 2


def test_the_manifest_says_what_was_taken(bundles: Bundles) -> None:
    weights = bundles.open("gptq-floats", "ort", **PLAIN).manifest.weights
    assert weights["linear"] == "int4 g128 asym"
    assert set(weights["other_groups"].values()) == {"int8 row sym"} and len(weights["other_groups"]) == 4
    assert "quantization_config" not in bundles.open("gptq", "ort", **PLAIN).file("config.json").read_text()
    assert bundles.open("gguf-q8_0", "aipc", **OPTIONS, flavour="native").manifest.weights["head"] == (
        "int8 g32 sym"
    )


def test_openvino_multiplies_integers(bundles: Bundles) -> None:
    """The CPU plugin keeps groups of bytes and zero points packed instead of compiling them into floats."""
    for variant, kind in (("gguf-q8_0", "i8"), ("gptq-asym", "u4"), (WIDE, "i4")):
        options = PLAIN | {"kv_cache": "fp32"}
        engine: Any = bundles.engine(variant, "aipc", **options)
        found = []
        for node in engine.compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if info["layerType"].astype(str) == "FullyConnected":
                found.append(info["runtimePrecision"].astype(str))
        assert found.count(kind) == 14, (variant, found)


@pytest.mark.parametrize(("head_format", "stored"), [(None, "int4 g128 asym"), ("int8", "int8 row sym")])
def test_a_quantized_head(tmp_path: Path, head_format: str | None, stored: str) -> None:
    """GPTQ with lm_head true: its integers are kept too, unless another format is asked for."""
    packing = Packing("gptq", 128, symmetric=False)
    tensors = stored_of("gptq-asym")
    head = quantized(np.asarray(tensors.pop("lm_head.weight")), packing, 0)
    config = config_of("gptq-asym") | {"quantization_config": packing.config() | {"lm_head": True}}
    matrices = {
        name: pack(name.removesuffix(".weight"), quantized(weight, packing, 0), packing)
        for name, weight in make_tensors(config).items()
        if name in packed_of("gptq-asym")
    }
    for raw in matrices.values():
        tensors |= raw
    tensors |= pack("lm_head", head, packing)
    for flavour in ("stock", "native"):
        result = export(
            ExportOptions(
                model=str(write_checkpoint(tmp_path / "model", config, tensors)),
                target="aipc",
                output=tmp_path / f"{flavour}-bundle",
                flavour=flavour,
                head_format=head_format,
            ),
            Progress(enabled=False),
        )
        report = result.manifest.verification
        assert result.manifest.weights["head"] == stored and report is not None and report["passed"]
    if head_format is None:
        constant = constants(tmp_path / "stock-bundle" / "openvino_model.xml")["lm_head.weight.codes"]
        np.testing.assert_array_equal(nibbles(constant[2].reshape(len(head.codes), -1)), head.codes)
