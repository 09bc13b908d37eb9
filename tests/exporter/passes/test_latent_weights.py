"""kv_b_proj, which latent attention multiplies head by head: its integers are those of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from cpm_edge.quant import quantize_int8
from tests.exporter.test_pipeline import CHUNKINGS, check, feed
from tests.support.bundles import TARGETS, Bundles
from tests.support.checkpoints import gguf_of, packed_of, tensors_of
from tests.support.packed import LATENT_PACKINGS
from tests.support.stored import constants, nibbles

Record = Callable[[str, object], None]
PLAIN = {"weight_format": "auto", "embedding_format": "fp32", "head_format": "fp32"}
NAMES = [f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in range(2)]
for_variants = pytest.mark.parametrize("variant", LATENT_PACKINGS)


def initializers(bundles: Bundles, variant: str, **options: Any) -> dict[str, Any]:
    graph = ir.load(bundles.open(variant, "ort", **options).file("model.onnx")).graph
    found = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


@for_variants
def test_onnx_holds_the_integers_of_the_checkpoint(bundles: Bundles, variant: str) -> None:
    stored, matrices = initializers(bundles, variant, **PLAIN), packed_of(variant)
    for name in NAMES:
        matrix = matrices[name].sorted()
        shape = (*matrix.scales.shape, 32)
        np.testing.assert_array_equal(stored[f"{name}.codes"], matrix.codes.reshape(shape))
        np.testing.assert_array_equal(stored[f"{name}.zeros"][..., 0], matrix.zeros)
        np.testing.assert_array_equal(stored[f"{name}.scales"][..., 0], matrix.scales)
        places = f"{name.removesuffix('.weight')}.places"
        assert (places in stored) == LATENT_PACKINGS[variant].act_order
        if places in stored:
            restored = matrix.codes[:, stored[places]]
            np.testing.assert_array_equal(restored, matrices[name].codes)


@for_variants
def test_openvino_holds_the_integers_of_the_checkpoint(bundles: Bundles, variant: str) -> None:
    stored = constants(bundles.open(variant, "aipc", **PLAIN).file("openvino_model.xml"))
    for name in NAMES:
        matrix = packed_of(variant)[name].sorted()
        kind, shape, codes = stored[f"{name}.codes"]
        assert (kind, shape) == ("i4" if LATENT_PACKINGS[variant].symmetric else "u4", [4 * (16 + 32), 3, 32])
        flip = np.uint8(0x88 if kind == "i4" else 0)
        np.testing.assert_array_equal(nibbles((codes ^ flip).reshape(192, -1)), matrix.codes)
        _, _, scales = stored[f"{name}.scales"]
        np.testing.assert_array_equal(scales.view(np.float16).reshape(192, 3), matrix.scales)


@pytest.mark.parametrize("variant", [*LATENT_PACKINGS, "minicpm3"])
def test_the_native_flavour_holds_the_same_integers(bundles: Bundles, variant: str) -> None:
    path = bundles.open(variant, "aipc", weight_format="auto", flavour="native").file("openvino_native.xml")
    stored = constants(path)
    for name in NAMES:
        if variant in LATENT_PACKINGS:
            matrix = packed_of(variant)[name].sorted()
            signed = matrix.codes.astype(int) - matrix.zeros[:, matrix.g_idx]
            scales = matrix.scales
        else:
            rounded = quantize_int8(tensors_of(variant)[name])
            signed, scales = rounded.codes.astype(int) - 128, rounded.scales
        kind, shape, raw = stored[f"{name}.up"]
        assert (kind, shape) == ("u8", [4 * scales.size + signed.size])
        np.testing.assert_array_equal(raw[: 4 * scales.size].view(np.float32).reshape(scales.shape), scales)
        np.testing.assert_array_equal(raw[4 * scales.size :].view(np.int8).reshape(signed.shape), signed)


@pytest.mark.parametrize("variant", ["minicpm3-gguf-q4_0", "minicpm3-gguf-q8_0"])
def test_onnx_holds_the_integers_of_gguf_blocks(bundles: Bundles, variant: str) -> None:
    stored, blocks = initializers(bundles, variant, **PLAIN), gguf_of(variant)
    for name in NAMES:
        matrix = blocks[name].integers
        assert matrix is not None
        shape = (*matrix.scales.shape, 32)
        np.testing.assert_array_equal(stored[f"{name}.codes"], matrix.codes.reshape(shape))
        np.testing.assert_array_equal(stored[f"{name}.scales"][..., 0], matrix.scales)


@pytest.mark.parametrize("target", TARGETS)
@for_variants
def test_the_bundle_computes_what_the_checkpoint_does(
    bundles: Bundles, variant: str, target: str, record_property: Record
) -> None:
    with bundles.engine(variant, target, **PLAIN, activations="fp32").session() as session:
        got = feed(session, bundles.prompt, CHUNKINGS["odd chunks"])
    check(got, bundles.reference(variant), record_property)


def test_rounded_weights_have_a_scale_a_row(bundles: Bundles) -> None:
    tensors = tensors_of("minicpm3")
    stored = initializers(bundles, "minicpm3", weight_format="int4")
    ir_stored = constants(bundles.open("minicpm3", "aipc", weight_format="int4").file("openvino_model.xml"))
    for name in NAMES:
        expected = quantize_int8(tensors[name])
        np.testing.assert_array_equal(stored[f"{name}.codes"][:, 0], expected.codes)
        np.testing.assert_array_equal(stored[f"{name}.scales"][:, 0], expected.scales)
        kind, shape, codes = ir_stored[f"{name}.codes"]
        assert (kind, shape) == ("i8", list(expected.codes.shape))
        np.testing.assert_array_equal(codes.reshape(shape) ^ np.uint8(0x80), expected.codes)


@pytest.mark.parametrize("target", TARGETS)
def test_the_manifest_says_what_was_taken(bundles: Bundles, target: str) -> None:
    weights = bundles.open("minicpm3-gptq", target, **PLAIN).manifest.weights
    assert (weights["linear"], weights["absorbed"]) == ("int4 g32 sym", "int4 g32 sym")
    assert (
        bundles.open("minicpm3", target, weight_format="int4").manifest.weights["absorbed"] == "int8 row sym"
    )
    assert bundles.open("llama", target).manifest.weights["absorbed"] is None
