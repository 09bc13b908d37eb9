"""What the lowered graphs consist of."""

from __future__ import annotations

from collections import Counter
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from cpm_edge.runtimes.bundle import Bundle
from tests.support.bundles import NATIVE, Bundles
from tests.support.checkpoints import VARIANTS, make_tensors

INT4 = {"weight_format": "int4"}


def onnx_graph(bundles: Bundles, variant: str, **options: Any) -> ir.Model:
    return ir.load(bundles.open(variant, "ort", **options).file("model.onnx"))


def openvino_model(bundles: Bundles, variant: str, **options: Any) -> Any:
    import openvino

    return openvino.Core().read_model(bundles.open(variant, "aipc", **options).file("openvino_model.xml"))


def kinds_of(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def test_dense_layers_become_grouped_query_attention(bundles: Bundles) -> None:
    model = onnx_graph(bundles, "llama")
    count = Counter(node.op_type for node in model.graph)
    assert count["GroupQueryAttention"] == 3 and count["FusedMatMul"] == 7 * 3 + 1
    assert not {"SparseAttention", "MatMul", "Transpose"} & set(count) and not model.functions
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert (node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")) == (4, 2)
    assert node.attributes.get_float("scale") == pytest.approx(32**-0.5)


def test_sparse_layers_keep_the_op_and_bring_its_body(bundles: Bundles) -> None:
    model = onnx_graph(bundles, "sparse")
    count = Counter(node.op_type for node in model.graph)
    assert count["SparseAttention"] == 2 and "GroupQueryAttention" not in count
    assert ("cpm", "SparseAttention", "") in model.functions


def test_integers_become_matmul_nbits(bundles: Bundles) -> None:
    model = onnx_graph(bundles, "llama", **INT4)
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert Counter(node.attributes.get_int("bits") for node in nodes) == {4: 7 * 3, 8: 1}
    assert {
        node.attributes.get_int("block_size") for node in nodes if node.attributes.get_int("bits") == 4
    } == {32}
    assert not any(name.endswith("q_proj.weight") for name in model.graph.initializers)


def test_onnx_inputs_are_those_of_onnxruntime_genai(bundles: Bundles) -> None:
    model = onnx_graph(bundles, "llama")
    names = [value.name for value in model.graph.inputs]
    assert names[:2] == ["input_ids", "attention_mask"] and "past_length" not in names
    assert model.graph.inputs[2].name == "logits_from"
    # It has a default, so that genai need not feed it.
    np.testing.assert_array_equal(onnx_data(model.graph, "logits_from"), [0])


def test_openvino_has_one_sdpa_and_two_states_a_layer(bundles: Bundles) -> None:
    model = openvino_model(bundles, "llama")
    count = kinds_of(model)
    assert count["ScaledDotProductAttention"] == 3
    assert count["ReadValue"] == count["Assign"] == 6
    names = {name for value in model.inputs for name in value.get_names()}
    assert names == {"input_ids", "attention_mask", "beam_idx"}


def test_openvino_fuses_the_cache_into_the_attention(bundles: Bundles) -> None:
    """The attention reads its two states itself; otherwise they would be copied at every step."""
    engine: Any = bundles.engine("llama", "aipc")
    nodes = engine.compiled.get_runtime_model().get_ops()
    kinds = {n.get_friendly_name(): n.get_rt_info()["layerType"].astype(str) for n in nodes}
    attention = [n for n in nodes if kinds[n.get_friendly_name()] == "ScaledDotProductAttention"]
    assert len(attention) == 3
    for node in attention:
        sources = [i.get_source_output().get_node().get_friendly_name() for i in node.inputs()]
        assert [kinds[name] for name in sources].count("MemoryInput") == 2
        assert "beam_idx" in sources


def test_openvino_sorts_ties_to_the_lowest_index(bundles: Bundles) -> None:
    tree = ElementTree.parse(bundles.open("sparse", "aipc").file("openvino_model.xml"))
    sorts = [layer for layer in tree.iter("layer") if layer.get("type") == "TopK"]
    assert len(sorts) == 2
    assert all(layer.find("data").get("stable") == "true" for layer in sorts)  # type: ignore[union-attr]


def test_openvino_constants_hold_the_checkpoint(bundles: Bundles) -> None:
    tensors = make_tensors(VARIANTS["llama"])
    model = openvino_model(bundles, "llama")
    found = {n.get_friendly_name(): n for n in model.get_ops() if n.get_type_name() == "Constant"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].get_data(), tensor)
    assert not [p for p in model.get_parameters() if p.get_friendly_name() in tensors]


def test_precisions_travel_with_the_openvino_model(bundles: Bundles) -> None:
    for options, cache, group in (
        ({}, "f32", "0"),
        (INT4, "f16", "0"),
        (INT4 | {"kv_cache": "int8", "activations": "int8"}, "u8", "32"),
    ):
        model = openvino_model(bundles, "llama", **options)
        assert model.get_rt_info(["runtime_options", "KV_CACHE_PRECISION"]).astype(str) == cache
        assert model.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).astype(str) == group


def stored_bytes(bundle: Bundle, name: str) -> npt.NDArray[np.uint8]:
    """The bytes of one constant of the IR; OpenVINO's own accessors would convert them."""
    tree = ElementTree.parse(bundle.file("openvino_model.xml"))
    layer = next(layer for layer in tree.iter("layer") if layer.get("name") == name)
    data = layer.find("data")
    assert data is not None
    start, size = int(data.get("offset", "")), int(data.get("size", ""))
    return np.fromfile(bundle.file("openvino_model.bin"), np.uint8, size, offset=start)


def onnx_data(graph: ir.Graph, name: str) -> npt.NDArray[Any]:
    value = graph.initializers[name].const_value
    assert value is not None
    return value.numpy().reshape(-1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_both_targets_store_the_same_integers(bundles: Bundles, symmetric: bool) -> None:
    options = INT4 | {"group_size": 32, "symmetric": symmetric}
    graph, bundle = onnx_graph(bundles, "llama", **options).graph, bundles.open("llama", "aipc", **options)
    for tensor in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        # int4 is two's complement in OpenVINO and offset by 8 in MatMulNBits, two in a byte.
        flip = 0x88 if symmetric else 0
        codes = stored_bytes(bundle, f"{tensor}.codes")
        np.testing.assert_array_equal(codes ^ flip, onnx_data(graph, f"{tensor}.codes"))
        scales = stored_bytes(bundle, f"{tensor}.scales").view(np.float16)
        np.testing.assert_array_equal(scales.astype(np.float32), onnx_data(graph, f"{tensor}.scales"))


def native_nodes(bundles: Bundles, variant: str) -> list[tuple[str, str]]:
    """(type, name) of our ops, in the order of the file."""
    bundle = bundles.open(variant, "aipc", **NATIVE)
    layers = ElementTree.parse(bundle.file("openvino_native.xml")).getroot().find("layers")
    assert layers is not None
    ours = [layer for layer in layers if layer.get("version") == "cpm"]
    return [(layer.get("type", ""), layer.get("name", "")) for layer in ours]


def test_native_layers_of_both_kinds_have_five_nodes(bundles: Bundles) -> None:
    nodes = native_nodes(bundles, "sala")
    mlp = ["LinearAdd", "NormGated", "LinearAdd"]
    linear, sparse = ["NormLinear", "RecurrentAttention", *mlp], ["NormLinear", "CachedAttention", *mlp]
    assert [kind for kind, _ in nodes] == [*(linear + sparse) * 2, "NormLinear"]
    assert [name for _, name in nodes if name.endswith((".qkv", ".qkvz"))] == [
        "layers.0.qkvz", "layers.1.qkv", "layers.2.qkvz", "layers.3.qkv",
    ]  # fmt: skip


def test_linear_attention_is_onnxruntimes_own(bundles: Bundles) -> None:
    model = onnx_graph(bundles, "sala")
    nodes = [node for node in model.graph if node.op_type == "LinearAttention"]
    assert {node.domain for node in nodes} == {"com.microsoft"} and len(nodes) == 2
    assert nodes[0].inputs[4] is nodes[1].inputs[4]  # one tensor of decays for all
    assert not (bundles.open("sala-dense", "ort").path / "genai_config.json").exists()


def test_openvino_keeps_a_state_of_fixed_size_a_linear_layer(bundles: Bundles) -> None:
    model = openvino_model(bundles, "sala")
    shapes = Counter(
        str(node.get_output_partial_shape(0)) for node in model.get_ops() if node.get_type_name() == "Assign"
    )
    assert shapes == {"[?,4,24,24]": 2, "[?,2,?,16]": 4}
