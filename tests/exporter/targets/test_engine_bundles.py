"""Bundles of the targets jetson and rtx: files, ports, nodes, what is refused, and engines built of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from cpm_edge.benchmarks.trt_build import measure_build
from cpm_edge.exporter.cubins.compile import compile_cubins
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.export import export
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.tensorrt_library import library
from cpm_edge.runtimes.embedding import HostEmbedding
from cpm_edge.runtimes.manifest import Manifest
from tests.exporter.targets.conftest import CHIP, FORMS
from tests.support.bundles import Bundles

INT4: dict[str, Any] = {"weight_format": "int4"}
FLOAT16, INT32 = ir.DataType.FLOAT16, ir.DataType.INT32


def ports(values: Any) -> dict[str, tuple[Any, list[Any]]]:
    return {value.name: (value.dtype, [getattr(d, "value", d) for d in value.shape]) for value in values}


def graph(engines: Bundles, variant: str, **options: Any) -> ir.Graph:
    return ir.load(engines.open(variant, **options).file("model.onnx")).graph


def test_a_jetson_bundle_twice(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The fixture engines, which other folders use too, replaces it for the rest of the session.
    monkeypatch.setattr("cpm_edge.exporter.targets.engine_native.compile_cubins", compile_cubins)
    options = bundles.options("tied-mha", weight_format="int8", max_context=500, **FORMS["native"])
    manifests: list[Manifest] = []
    for name in ("a", "b"):
        done = export(dataclasses.replace(options, output=tmp_path / name), Progress(enabled=False))
        manifests.append(done.manifest)
    first, second = manifests
    assert first.files == second.files and first.chip == CHIP and first.flavour == "native"
    folder = tmp_path / "a"
    assert {name for name in first.files if name.startswith("plugins/")} == {
        "plugins/libcpm_tensorrt.so",
        "plugins/kernels/index.json",
        *(f"plugins/kernels/{path.name}" for path in (folder / "plugins/kernels").glob("*.cubin")),
    }
    assert (folder / "plugins/libcpm_tensorrt.so").read_bytes() == library("aarch64").read_bytes()
    # The kernels are those of the plans, no more, each as the index says.
    index = json.loads((folder / "plugins/kernels/index.json").read_text())
    model = ir.load(folder / "model.onnx")
    plans = [json.loads(node.attributes.get_string("plan")) for node in model.graph if node.domain == "cpm"]
    used = {launch["kernel"] for plan in plans for each in plan["variants"] for launch in each["launches"]}
    assert {each["name"] for each in index["kernels"]} == used and index["sm"] == 87
    for each in index["kernels"]:
        data = (folder / "plugins/kernels" / each["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == each["sha256"]
    assert not model.functions  # a body would win over the plugin
    engine = first.engine
    assert (engine["name"], engine["requires"], engine["sm"]) == ("tensorrt", ">=10.3", 87)
    assert engine["prefill_chunk"] == 512 and engine["plugins"]["version"] == "1"
    assert engine["plugins"]["names"] == ["CpmMatMulNBits", "CpmSparseAttention"]
    assert engine["memory"]["weights"] == first.files["model.onnx.data"].bytes
    assert engine["memory"]["kv_cache"] == 2 * 2 * 4 * 512 * 16 * 2
    assert (first.cache["form"], first.cache["capacity"], first.cache["dtype"]) == (
        "in_place",
        512,
        "float16",
    )


def test_ports_of_a_native_graph(engines: Bundles) -> None:
    found = graph(engines, "sala", weight_format="int8", **FORMS["native"])
    cache, pooled, state = [1, 2, 1024, 16], [1, 2, 256, 16], [1, 4, 24, 24]
    float32 = ir.DataType.FLOAT
    expected = {
        "inputs_embeds": (FLOAT16, [1, "sequence", 64]),
        "past_length": (INT32, [1]),
        "logit_rows": (INT32, ["rows"]),
    }
    for layer in range(4):
        sparse = {"key": (FLOAT16, cache), "value": (FLOAT16, cache), "pooled": (FLOAT16, pooled)}
        own = sparse if layer % 2 else {"recurrent_state": (float32, state)}
        expected |= {f"past_key_values.{layer}.{port}": each for port, each in own.items()}
    assert ports(found.inputs) == expected
    presents = {
        name.replace("past_key_values", "present"): each
        for name, each in expected.items()
        if name.startswith("past_key_values")
    }
    assert ports(found.outputs) == {"logits": (float32, [1, "rows", 320]), **presents}
    for node in (node for node in found if node.domain == "cpm"):
        assert node.attributes.get_string("plugin_version") == "1"
        assert node.attributes.get_string("plugin_namespace") == "cpm"
    (attention, *_) = [node for node in found if node.op_type == "CpmSparseAttention"]
    names = [value.name for value in attention.inputs[3:] if value is not None]
    assert names == [
        "past_key_values.1.key",
        "past_key_values.1.value",
        "past_length",
        "past_key_values.1.pooled",
    ]


def test_ports_of_a_stock_graph(engines: Bundles) -> None:
    found = graph(engines, "sparse", **INT4, **FORMS["stock"])
    rows = (FLOAT16, [1, 2, "sequence", 16])
    outputs = {f"new.{layer}.{port}": rows for layer in range(2) for port in ("key", "value")}
    assert ports(found.outputs) == {"logits": (ir.DataType.FLOAT, [1, "rows", 320]), **outputs}
    assert ports(found.inputs)["past_key_values.1.key"] == (FLOAT16, [1, 2, 1024, 16])
    assert {node.domain for node in found} == {""} and found.opset_imports[""] == 21
    codes = found.initializers["model.layers.0.mlp.down_proj.weight.codes"]
    assert codes.dtype == ir.DataType.INT4 and codes.shape == (64, 96)


def test_tied_float16_weights_stay_in_the_engine(engines: Bundles) -> None:
    options = {"weight_format": "fp16", **FORMS["native"]}
    found = graph(engines, "tied-mha", **options)
    assert ports(found.inputs)["input_ids"] == (INT32, [1, "sequence"])
    bundle = engines.open("tied-mha", **options)
    assert bundle.manifest.engine["embedding"] is None
    assert not any(name.startswith("embedding") for name in bundle.manifest.files)


@pytest.mark.parametrize(
    ("variant", "weight_format", "form", "file"),
    [
        ("llama", "int4", "stock", "embedding.bin"),
        ("llama", "fp16", "native", "embedding.bin"),
        ("minicpm3", "int4", "stock", "model.onnx.data"),
        ("tied-mha", "int4", "native", "model.onnx.data"),
    ],
)
def test_the_host_reads_rows_of_the_embedding(
    engines: Bundles, variant: str, weight_format: str, form: str, file: str
) -> None:
    options = {"weight_format": weight_format, **FORMS[form]}
    bundle = engines.open(variant, **options)
    assert bundle.manifest.engine["embedding"]["file"] == file
    with engines.plan(variant, **options) as (_, weights):
        expected = weights.dequantized("model.embed_tokens.weight").astype(np.float16)
    ids = np.array([3, 319, 0, 3])
    rows = np.empty((4, 64), np.float16)
    HostEmbedding(bundle).gather(ids, rows)
    np.testing.assert_array_equal(rows, expected[ids])


@pytest.mark.filterwarnings("ignore:TensorRT reads all 8 experts")
@pytest.mark.parametrize("variant", ["minicpm3", "moe"])
def test_engines_are_built_of_latents_and_experts(engines: Bundles, variant: str) -> None:
    """By TensorRT-RTX, which needs no GPU for that; the other kinds of layers: tests/runtimes/tensorrt."""
    folder = engines.open(variant, **INT4, **FORMS["stock"]).path
    assert measure_build(folder, (86, 89)).engine_bytes > (folder / "model.onnx.data").stat().st_size


@pytest.mark.parametrize(
    ("variant", "options", "message", "hint"),
    [
        ("llama", {**INT4, "flavour": "native"}, "expected stock for target rtx", "no plugins"),
        ("llama", {"weight_format": "fp32"}, "--weight-format: expected fp16, int8", "fp16"),
        ("llama", {"weight_format": "int4", "head_format": "bf16"}, "--head-format: expected fp16", "fp16"),
        ("llama", {**INT4, "kv_cache": "int8"}, "--kv-cache: expected fp16", "leave --kv-cache out"),
        ("llama", {**INT4, "activations": "int8"}, "--activations: expected none", "computes in float16"),
        ("llama", {**INT4, "symmetric": False}, "int4 g32 asym: zero points need the plugin", "native"),
        ("llama", {**INT4, "chip": CHIP}, "expected a chip of target rtx", "--target jetson"),
        ("llama", {**INT4, "chip": "toaster"}, "--chip: expected one of", "cpm-bench chips"),
        ("llama", {**INT4, "target": "jetson"}, "expected --chip", "cpm-bench chips"),
        (
            "minicpm3",
            {**INT4, **FORMS["native"]},
            "got latent attention, for which a Jetson has no kernels",
            "stock",
        ),
        ("ternary-wide", {"weight_format": "ternary"}, "expected scales that float16 holds", "rounds anew"),
        ("gguf-q8_0", {"weight_format": "auto"}, "one scale a row", "int8 rounds anew"),
    ],
)
def test_what_an_engine_does_not_take(
    bundles: Bundles, tmp_path: Path, variant: str, options: dict[str, Any], message: str, hint: str
) -> None:
    asked = bundles.options(variant, **{"target": "rtx", "activations": None, **options})
    with pytest.raises(ExportError) as caught:
        export(dataclasses.replace(asked, output=tmp_path / "out"), Progress(enabled=False))
    assert message in str(caught.value) and hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_chip_without_the_memory(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpm_edge.exporter.targets.engine_manifest.cached_bytes", lambda *_: 7 << 30)
    asked = bundles.options("llama", **INT4, target="jetson", flavour="stock", activations=None, chip=CHIP)
    with pytest.raises(ExportError, match=r"Orin Nano 8GB: expected at most 6\.24 GiB .* 7\.00 GiB KV cache"):
        export(dataclasses.replace(asked, output=tmp_path / "out"), Progress(enabled=False))
