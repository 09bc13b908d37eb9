"""MLPs of which the native kernels read a part: the fused graph, and the bytes that its weights get."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from cpm_edge.exporter import trace
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.builder import Builder
from cpm_edge.exporter.passes.native_mlp import find_sparse_mlps
from cpm_edge.exporter.passes.native_ops import NativeFusion
from cpm_edge.exporter.passes.native_plan import NativePlan
from cpm_edge.exporter.passes.native_weights import NativeWeights
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.sparse_mlp.layouts import pack_slices
from cpm_edge.quant import Quantized, Scheme, WeightFormat
from tests.support.bundles import NATIVE, Bundles
from tests.support.stored import constants

FIRST = "model.layers.0.mlp"


class UnevenExperts(ModelWeights):
    """One expert has more bits than the others."""

    def scheme(self, name: str) -> Scheme:
        return Scheme(WeightFormat.INT8) if name.endswith("experts.3.w1.weight") else super().scheme(name)


def traced(bundles: Bundles, variant: str, kind: type[ModelWeights]) -> tuple[ir.Graph, ModelWeights]:
    with bundles.plan(variant, "aipc", **NATIVE) as (plan, weights):
        graph = trace.trace(plan.architecture.model_class(), plan.config, plan.config.rope.table(64)).graph
        return graph, kind(weights.checkpoint, weights.shapes, weights.constants, weights.policy)


def test_experts_are_one_node_a_layer(bundles: Bundles) -> None:
    stored = constants(bundles.open("moe", "aipc", **NATIVE).file("openvino_native.xml"))
    sizes = {name: raw.size for name, (_, _, raw) in stored.items() if ".experts." in name}
    shape = NBitsShape(96, 64, 4, 32)
    expected = 8 * shape.panels * shape.groups * (16 + 8 * 32 // 2)
    for layer in range(2):
        for part in ("w1", "w3", "w2"):
            assert sizes.pop(f"model.layers.{layer}.mlp.experts.{part}.panels") == expected
    assert not sizes
    kind, _, raw = stored[f"{FIRST}.gate.weight"]
    assert kind == "f32" and raw.size == 4 * 8 * 64


def test_experts_of_several_formats_get_the_most_bits(bundles: Bundles) -> None:
    graph, weights = traced(bundles, "moe", UnevenExperts)
    plan = NativeFusion(graph, weights).run()
    bits = {shape.bits for name, shape in plan.shapes.items() if ".experts." in name}
    assert bits == {8}
    assert [node.op_type for node in graph].count("NormExperts") == 2


def test_neurons_lie_together(bundles: Bundles) -> None:
    graph, weights = traced(bundles, "fatrelu", ModelWeights)
    (first, _) = find_sparse_mlps(graph)
    assert (first.up, first.down) == (f"{FIRST}.up_proj.weight", f"{FIRST}.down_proj.weight")
    assert first.threshold == 1.25
    plan = NativeFusion(graph, weights).run()
    endings = {name.rpartition(".")[2]: tensors for name, tensors in plan.panels.items() if FIRST in name}
    assert endings == {"panels": [first.gate], "strips": [first.up], "slices": [first.down]}
    nodes = [node for node in graph if node.op_type == "NormSparseMlp"]
    assert len(nodes) == 2 and not any(node.op_type in ("Where", "LessOrEqual") for node in graph)


def test_neurons_in_another_order_are_refused(bundles: Bundles) -> None:
    graph, weights = traced(bundles, "fatrelu", ModelWeights)
    (first, _) = find_sparse_mlps(graph)
    transpose = next(n for n in graph if n.op_type == "Transpose" and n.inputs[0].name == first.down)  # type: ignore[union-attr]
    down = next(user for user, _ in transpose.outputs[0].uses())
    builder = Builder(graph)
    order = builder.constant("order", np.arange(96)[::-1], np.int32)
    sorted_columns = builder.op("Gather", [down.inputs[0], order], {"axis": -1}, name="sorted")
    graph.insert_before(down, builder.nodes)
    down.replace_input_with(0, sorted_columns)
    with pytest.raises(
        ExportError, match=rf"tensor {FIRST}\.down_proj\.weight: the native flavour reads"
    ) as refusal:
        NativeFusion(graph, weights).run()
    assert refusal.value.hint == "--flavour stock"


class Blocks(ModelWeights):
    """One tensor that comes in blocks of given sizes."""

    def __init__(self, whole: Quantized, sizes: list[int]) -> None:
        self.whole, self.sizes = whole, sizes

    def quantized(self, name: str) -> Iterator[Quantized]:
        ends = np.cumsum(self.sizes)
        for first, last in zip([0, *ends[:-1]], ends, strict=True):
            rows = slice(int(first), int(last))
            zeros = None if self.whole.zeros is None else self.whole.zeros[rows]
            yield Quantized(self.whole.codes[rows], self.whole.scales[rows], zeros, self.whole.scheme)


@pytest.mark.parametrize("sizes", [[300], [8, 120, 172], [200, 56, 44], [128, 128, 44], [8] * 37 + [4]])
@pytest.mark.parametrize("symmetric", [True, False])
def test_slices_do_not_depend_on_blocks(sizes: list[int], symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (300, 64)).astype(np.uint8)
    scales = rng.uniform(0.5, 1, (300, 2)).astype(np.float16).astype(np.float32)
    zeros = None if symmetric else rng.integers(0, 16, (300, 2)).astype(np.uint8)
    whole = Quantized(codes, scales, zeros, Scheme(WeightFormat.INT4, 32, symmetric))
    shape = NBitsShape(300, 64, 4, 32, symmetric)
    weights = NativeWeights.__new__(NativeWeights)
    weights.weights = Blocks(whole, sizes)
    weights._plan = NativePlan({"down.slices": ["down"]}, shapes={"down": shape})
    parts: list[npt.NDArray[np.uint8]] = list(weights._packed("down.slices"))
    np.testing.assert_array_equal(np.concatenate(parts), pack_slices(shape, codes, scales, zeros))
