from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from cpm_edge.exporter import eager, trace
from cpm_edge.exporter.configs import LlamaConfig, MiniCPMConfig
from cpm_edge.exporter.models import llama, minicpm
from cpm_edge.plugins.sparse_attention.body import functions
from tests.support.bundles import Bundles
from tests.support.checkpoints import VARIANTS, make_tensors, prompt

LAYER_TENSORS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def traced(config: dict[str, Any]) -> ir.Model:
    if "scale_emb" in config:
        minicpm_config = MiniCPMConfig.from_dict(config)
        return trace.trace(minicpm.Model, minicpm_config, minicpm_config.rope.table(256))
    llama_config = LlamaConfig.from_dict(config)
    return trace.trace(llama.Model, llama_config, llama_config.rope.table(1024))


@pytest.fixture(scope="module")
def graph(bundles: Bundles) -> ir.Graph:
    """The traced llama variant; ``bundles`` keeps it."""
    return traced(VARIANTS["llama"]).graph


def test_inputs_and_outputs(graph: ir.Graph) -> None:
    caches = [f"{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    inputs = ["input_ids", "past_length", "logits_from", *(f"past_key_values.{c}" for c in caches)]
    assert [value.name for value in graph.inputs] == inputs
    assert [value.name for value in graph.outputs] == ["logits", *(f"present.{c}" for c in caches)]
    shapes = {value.name: list(map(str, value.shape or ())) for value in (*graph.inputs, *graph.outputs)}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["past_key_values.2.value"] == shapes["present.2.value"] == ["batch", "2", "capacity", "32"]
    assert shapes["logits"] == ["batch", "rows", "320"]


def test_initializers_are_the_checkpoints_tensors_without_data(graph: ir.Graph) -> None:
    stored = make_tensors(VARIANTS["llama"])
    weights = {name: value for name, value in graph.initializers.items() if value.const_value is None}
    assert set(weights) == {*stored, "rotary.inv_freq"}
    for name, value in weights.items():
        expected = stored[name].shape if name in stored else (16,)
        assert value.shape is not None and value.shape.numpy() == expected


def test_a_tied_head_reads_the_embedding(bundles: Bundles) -> None:
    graph = traced(VARIANTS["tied-mha"]).graph
    assert "lm_head.weight" not in graph.initializers
    embedding = graph.initializers["model.embed_tokens.weight"]
    assert {node.op_type for node, _ in embedding.uses()} == {"Gather", "Transpose"}


def test_every_layer_has_its_own_weights_and_caches(graph: ir.Graph) -> None:
    """Sample inputs that were one tensor would have become one input: key and value would be mixed up."""
    nodes = [node for node in graph if node.op_type == "SparseAttention"]
    assert len(nodes) == 3
    for index, node in enumerate(nodes):
        caches = [value.name for value in node.inputs[3:5] if value is not None]
        assert caches == [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        assert [value.name for value in node.outputs[1:]] == [
            f"present.{index}.key",
            f"present.{index}.value",
        ]
        for tensor in LAYER_TENSORS:
            assert graph.initializers[f"model.layers.{index}.{tensor}.weight"].uses()


def test_the_samples_are_distinct() -> None:
    samples = trace._Samples(LlamaConfig.from_dict(VARIANTS["llama"]))
    for part in (samples.embed(), samples.layer(0), samples.head()):
        assert len({id(sample.tensor) for sample in part}) == len(part)
        assert all(isinstance(sample.tensor, torch._subclasses.FakeTensor) for sample in part)


def test_no_functions_and_one_custom_op_are_left(graph: ir.Graph) -> None:
    assert {node.domain for node in graph} <= {"", "cpm"}
    assert {node.op_type for node in graph if node.domain == "cpm"} == {"SparseAttention"}
    assert graph.opset_imports[""] == trace.OPSET and trace.PARTS not in graph.opset_imports
    assert not any(
        isinstance(dim, int) and dim in (2, 3, 7) for v in graph.inputs[:2] for dim in v.shape or ()
    )


def test_one_traced_layer_serves_all_of_its_kind(bundles: Bundles) -> None:
    """Five layers from one trace compute what five modules compute, batch and context at hand."""
    raw = VARIANTS["sparse"] | {"num_hidden_layers": 5}
    weights = make_tensors(raw)
    config = MiniCPMConfig.from_dict(raw)
    weights["rotary.inv_freq"] = config.rope.table(256).inv_freq
    ids = np.stack([prompt(130, seed) for seed in (3, 4)])

    model = eager.build_model(minicpm.Model, config, config.rope.table(256))
    eager.load_weights(model, "", weights.__getitem__, tied=False)
    caches = eager.empty_caches(config, 160, batch=2)
    with torch.no_grad():
        expected, presents = model(torch.from_numpy(ids), torch.zeros(2, dtype=torch.int64), caches)

    onnx = traced(raw)
    for name, value in onnx.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(weights[name], name=name)
    for function in functions(opset=trace.OPSET):
        onnx.functions[function.identifier()] = function
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(onnx).SerializeToString())
    feeds = {"input_ids": ids, "past_length": np.zeros(2, np.int64), "logits_from": np.array([100])}
    feeds |= {i.name: caches[0][0].numpy() for i in session.get_inputs() if "past_key" in i.name}
    got = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    np.testing.assert_allclose(got["logits"], expected[:, 100:].numpy(), atol=5e-4)
    for index, (key, value) in enumerate(presents):
        np.testing.assert_allclose(got[f"present.{index}.key"], key.numpy(), atol=5e-4)
        np.testing.assert_allclose(got[f"present.{index}.value"], value.numpy(), atol=5e-4)


def test_kinds_of_layers_are_traced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds among four layers: two layer traces, and each node has the attributes of its own kind."""

    @dataclasses.dataclass(frozen=True)
    class Mixed(MiniCPMConfig):
        def layer_kind(self, layer: int) -> str:
            return "dense" if layer == 2 else "sparse"

        def attention_spec(self, layer: int) -> Any:
            spec = super().attention_spec(layer)
            return dataclasses.replace(spec, topk=0) if layer == 2 else spec

    names = []
    export = trace._export

    def counted(module: torch.nn.Module, samples: Any, name: str) -> ir.Function:
        names.append(name)
        return export(module, samples, name)

    monkeypatch.setattr(trace, "_export", counted)
    config = Mixed.from_dict(VARIANTS["sparse"] | {"num_hidden_layers": 4})
    graph = trace.trace(minicpm.Model, config, config.rope.table(256)).graph
    assert names == ["embed", "head", "sparse", "dense"]
    topk = [n.attributes.get_int("topk") for n in graph if n.op_type == "SparseAttention"]
    assert topk == [3, 3, 0, 3]
