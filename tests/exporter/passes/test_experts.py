"""What the experts become on each target, and that only chosen ones are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from cpm_edge.exporter import trace
from cpm_edge.exporter.passes.experts import find_experts, inline_uneven_experts
from cpm_edge.exporter.passes.openvino_experts import stack_experts
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import Scheme, WeightFormat, unpack_ternary
from tests.support.bundles import Bundles
from tests.support.checkpoints import TERNARY_EXPERTS, tensors_of
from tests.support.stored import constants, nibbles

INT4: dict[str, Any] = {"weight_format": "int4", "group_size": 32, "activations": "int8"}
CACHE = {"kv_cache": "fp32"}
FIRST = "model.layers.0.mlp.experts"


def graph_of(bundles: Bundles, variant: str = "moe", **options: Any) -> ir.Graph:
    return ir.load(bundles.open(variant, "ort", **options).file("model.onnx")).graph


def data(graph: ir.Graph, name: str) -> npt.NDArray[Any]:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize(
    ("options", "bits", "block"),
    [
        ({"weight_format": "int4", "group_size": 32, "activations": "fp32"}, 4, 32),
        (INT4 | {"symmetric": False}, 4, 32),
        ({"weight_format": "int8", "activations": "int8"}, 8, 32),
    ],
)
def test_integers_become_qmoe(bundles: Bundles, options: dict[str, Any], bits: int, block: int) -> None:
    graph = graph_of(bundles, **options)
    nodes = [node for node in graph if node.op_type == "QMoE"]
    assert len(nodes) == 2 and not any(".experts.0." in name for name in graph.initializers)
    for node in nodes:
        read = node.attributes.get_int
        assert (read("expert_weight_bits"), read("block_size"), read("k")) == (bits, block, 2)
    products = Counter(node.op_type for node in graph)
    assert products["MatMulNBits"] == 2 * 4 + 1 and products["FusedMatMul"] == 2  # the routers stay floats


@pytest.mark.parametrize(
    "options", [{}, {"weight_format": "fp16"}, {"weight_format": "int8", "activations": "fp32"}]
)
def test_what_qmoe_would_round_further_is_written_out(bundles: Bundles, options: dict[str, Any]) -> None:
    graph = graph_of(bundles, **options)
    count = Counter(node.op_type for node in graph)
    assert "QMoE" not in count and count["ScatterND"] == 2 * 8
    assert count["FusedMatMul"] + count["MatMulNBits"] == 2 * (4 + 1 + 3 * 8) + 1


def test_qmoe_holds_the_integers_of_every_expert(bundles: Bundles) -> None:
    """Gate and up projections row by row in turn; the same codes as OpenVINO's."""
    graph = graph_of(bundles, **INT4)
    stored = constants(bundles.open("moe", "aipc", **INT4, **CACHE).file("openvino_model.xml"))
    fc1 = data(graph, f"{FIRST}.w1+w3.codes")
    assert fc1.shape == (8, 2 * 96, 32)
    for name, codes in (("w1", fc1[:, 0::2]), ("w3", fc1[:, 1::2]), ("w2", data(graph, f"{FIRST}.w2.codes"))):
        kind, shape, raw = stored[f"{FIRST}.{name}.codes"]
        rows, columns = (64, 96) if name == "w2" else (96, 64)
        assert (kind, shape) == ("i4", [8, rows, columns // 32, 32])
        # i4 is two's complement, and QMoE's codes are offset by 8.
        np.testing.assert_array_equal(codes.reshape(-1) ^ 0x88, raw)
    scales = data(graph, f"{FIRST}.w1+w3.scales")[:, 1::2]
    half = stored[f"{FIRST}.w3.scales"][2].view(np.float16)
    np.testing.assert_array_equal(scales.reshape(-1), half.astype(np.float32))


@pytest.mark.parametrize("options", [{}, INT4, {"weight_format": "int8"}, {"weight_format": "bf16"}])
@pytest.mark.parametrize("variant", ["moe", "moe-sparse"])
def test_openvino_gathers_the_chosen_experts(bundles: Bundles, variant: str, options: dict[str, Any]) -> None:
    """Without this fusion the plugin would compute and read all of them for every token."""
    engine: Any = bundles.engine(variant, "aipc", **options, **CACHE)
    nodes = engine.compiled.get_runtime_model().get_ops()
    kinds = Counter(node.get_rt_info()["layerType"].astype(str) for node in nodes)
    assert kinds["GatherMatmul"] == 2 * 3 and "Tile" not in kinds


def test_the_stock_ir_has_no_weight_twice(bundles: Bundles) -> None:
    stored = constants(bundles.open("moe", "aipc").file("openvino_model.xml"))
    tensors = tensors_of("moe")
    for name in ("w1", "w3", "w2"):
        expected = np.stack([tensors[f"{FIRST}.{expert}.{name}.weight"] for expert in range(8)])
        kind, shape, raw = stored[f"{FIRST}.{name}"]
        assert (kind, shape) == ("f32", list(expected.shape))
        np.testing.assert_array_equal(raw.view(np.float32), expected.reshape(-1))
    assert not any(".experts.0." in name for name in stored)


def test_ternary_experts_keep_their_integers(bundles: Bundles) -> None:
    """Groups differ from expert to expert: the smallest holds for all. OpenVINO gathers 4 bits, not 2."""
    options = {"weight_format": "auto", "activations": "int8"}
    graph = graph_of(bundles, TERNARY_EXPERTS, **options)
    stored = constants(bundles.open(TERNARY_EXPERTS, "aipc", **options).file("openvino_model.xml"))
    tensors = tensors_of(TERNARY_EXPERTS)
    codes = data(graph, f"{FIRST}.w2.codes")
    scales = data(graph, f"{FIRST}.w2.scales")
    kind, shape, raw = stored[f"{FIRST}.w2.codes"]
    assert kind == "i4" and shape == [4, 256, 16, 32]
    signed = (nibbles(raw.reshape(-1, 256) ^ np.uint8(0x88)).astype(np.int8) - 8).reshape(4, 256, 512)
    for expert in range(4):
        weight = tensors[f"{FIRST}.{expert}.w2.weight"]
        np.testing.assert_array_equal(signed[expert], np.sign(weight))
        own = unpack_ternary(codes[expert]).astype(np.float32) - 2
        np.testing.assert_array_equal(own * np.repeat(scales[expert], 32, axis=1), weight)
    # The router is not ternary and keeps its floats.
    router = data(graph, "model.layers.0.mlp.gate.weight")
    np.testing.assert_array_equal(router, tensors["model.layers.0.mlp.gate.weight"])


def test_ternary_experts_compute_what_the_checkpoint_does(bundles: Bundles) -> None:
    options = {"weight_format": "auto", "embedding_format": "fp32", "head_format": "fp32"}
    expected = bundles.reference(TERNARY_EXPERTS)
    for target, cache in (("ort", {}), ("aipc", CACHE)):
        with bundles.engine(TERNARY_EXPERTS, target, **options, **cache).session() as session:
            error = np.abs(session.forward(bundles.prompt, "all") - expected.logits)
        assert error.max() < 2e-3


class Uneven(ModelWeights):
    """Weights of which one expert is stored in another format."""

    def scheme(self, name: str) -> Scheme:
        return Scheme(WeightFormat.INT8) if name.endswith("experts.3.w1.weight") else super().scheme(name)


@pytest.mark.parametrize(("kind", "left"), [(ModelWeights, 2), (Uneven, 0)])
def test_uneven_experts_are_written_out(bundles: Bundles, kind: type[ModelWeights], left: int) -> None:
    with bundles.plan("moe", "ort", weight_format="int4") as (plan, weights):
        model = trace.trace(plan.architecture.model_class(), plan.config, plan.config.rope.table(64))
        assert len(find_experts(model.graph)) == 2
        uneven = kind(weights.checkpoint, weights.shapes, weights.constants, weights.policy)
        assert inline_uneven_experts(model, uneven) == 2 - left
        assert len(find_experts(model.graph)) == left


def test_stacks_name_the_tensors_of_every_expert(bundles: Bundles) -> None:
    with bundles.plan("moe", "aipc") as (plan, _):
        graph = trace.trace(plan.architecture.model_class(), plan.config, plan.config.rope.table(64)).graph
    experts = find_experts(graph)
    assert [each.prefix for each in experts] == [FIRST, FIRST.replace("0", "1")]
    stacks = stack_experts(graph, experts)
    assert stacks[f"{FIRST}.w3"] == [f"{FIRST}.{expert}.w3.weight" for expert in range(8)]
    shapes = {value.name: value.shape for value in graph.inputs if value.name in stacks}
    assert list(shapes[f"{FIRST}.w2"] or ()) == [8, 64, 96]
    assert not any(".experts.0." in name for name in graph.initializers)


@pytest.mark.parametrize("target", ["ort", "aipc"])
def test_the_router_is_in_float32(bundles: Bundles, target: str) -> None:
    bundle = bundles.open("moe", target, **INT4)
    router = tensors_of("moe")["model.layers.1.mlp.gate.weight"]
    if target == "ort":
        np.testing.assert_array_equal(
            data(graph_of(bundles, **INT4), "model.layers.1.mlp.gate.weight"), router
        )
    else:
        path: Path = bundle.file("openvino_model.xml")
        kind, _, raw = constants(path)["model.layers.1.mlp.gate.weight"]
        assert kind == "f32"
        np.testing.assert_array_equal(raw.view(np.float32), router.reshape(-1))
