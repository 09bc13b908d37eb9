from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.verify import compare, median_cosine, relative_error, verify, verify_in_child
from cpm_edge.runtimes.bundle import Bundle, hash_files, open_bundle, write_manifest
from tests.support.bundles import TARGETS, Bundles

RNG = np.random.default_rng(5)
LOGITS = RNG.standard_normal((6, 40)).astype(np.float32) * 3


def test_equal_logits() -> None:
    report = compare(LOGITS, LOGITS)
    assert report["cosine"] == pytest.approx(1) and report["top1"] == 1
    assert report["max_abs"] == 0 and report["kl"] == pytest.approx(0, abs=1e-12)
    assert report["logit_std"] == pytest.approx(LOGITS.std())


def test_the_worst_row_counts_for_the_cosine_and_all_for_the_rest() -> None:
    other = LOGITS.copy()
    other[3] = -other[3]
    report = compare(LOGITS, other)
    assert report["cosine"] == pytest.approx(-1)
    assert report["max_abs"] == pytest.approx(2 * np.abs(LOGITS[3]).max())
    assert report["top1"] == pytest.approx(5 / 6)


def test_kl_is_that_of_the_distributions() -> None:
    other = LOGITS + RNG.standard_normal(LOGITS.shape).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) for x in (LOGITS, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert compare(LOGITS, other)["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean())
    # A constant changes no distribution, and huge logits overflow nothing.
    assert compare(LOGITS, LOGITS + 7)["kl"] == pytest.approx(0, abs=1e-9)
    assert np.isfinite(compare(LOGITS * 300, LOGITS * 299)["kl"])


def test_relative_error() -> None:
    assert relative_error(LOGITS, LOGITS * 1.5) == pytest.approx(0.5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", ["llama", "sparse", "sala", "minicpm3", "moe", "fatrelu"])
def test_a_good_bundle_passes(bundles: Bundles, variant: str, target: str) -> None:
    options = {"weight_format": "int4"}
    bundle = bundles.open(variant, target, **options)
    # Long enough to be sparse: 90 tokens, dense_len is 64.
    report = verify(
        dataclasses.replace(bundles.options(variant, target, **options), verify_tokens=90), bundle
    )
    assert report["passed"] and report["first_diverging_layer"] is None
    assert report["tokens"] == 90 and report["decoded"] == 8
    assert report["cosine"] > 0.9999 and report["top1"] > 0.95
    # What quantization costs is told apart from what the engine does.
    assert report["against_checkpoint"]["cosine"] < report["cosine"]
    assert report["against_checkpoint"]["kl"] > 10 * report["kl"]


@pytest.mark.parametrize(("target", "flavour"), [("ort", {}), ("aipc", {"flavour": "native"})])
def test_int8_activations_may_turn_the_choice_of_blocks(
    bundles: Bundles, target: str, flavour: dict[str, str]
) -> None:
    options: dict[str, Any] = {"weight_format": "int8", "activations": "int8", **flavour}
    bundle = bundles.open("sparse", target, **options)
    asked = bundles.options("sparse", target, **options)
    report = verify(dataclasses.replace(asked, verify_tokens=150), bundle)
    assert report["sparse_rows"] == 87
    assert report["judged_by"] == "median_cosine" and report["passed"]
    assert report["median_cosine"] > 0.99
    # Rows that see everything choose nothing.
    assert verify(dataclasses.replace(asked, verify_tokens=60), bundle)["judged_by"] == "cosine"


@pytest.mark.parametrize("wrong", [range(10), range(10, 16), range(16, 20)])
def test_every_part_of_the_rows_has_its_median(wrong: range) -> None:
    expected = RNG.standard_normal((20, 40)).astype(np.float32)
    got = expected.copy()
    got[wrong[0]] *= -1
    assert median_cosine(expected, got, 4, 10) == pytest.approx(1)
    got[wrong.start : wrong.stop] = -expected[wrong.start : wrong.stop]
    assert median_cosine(expected, got, 4, 10) == pytest.approx(-1)


def test_ternary_schemes_reach_the_child(bundles: Bundles) -> None:
    options = {"weight_format": "auto", "flavour": "native", "verify": True}
    manifest = bundles.result("ternary-mixed", "aipc", **options).manifest
    assert manifest.verification is not None and manifest.verification["passed"]
    # Only embedding and head were rounded.
    assert manifest.verification["against_checkpoint"]["kl"] < 5e-3
    assert manifest.weights["linear"] == "ternary row" and len(manifest.weights["other_groups"]) == 9


def damaged(bundle: Bundle, folder: Path, name: str, start: int, size: int) -> Bundle:
    """A copy in which some weights are others, with a manifest that agrees."""
    shutil.copytree(bundle.path, folder)
    data = bytearray((folder / name).read_bytes())
    data[start : start + size] = np.full(size // 4, 0.3, np.float32).tobytes()
    (folder / name).write_bytes(data)
    write_manifest(folder, dataclasses.replace(bundle.manifest, files=hash_files(folder)))
    return open_bundle(folder)


def test_the_layer_that_diverges_is_named(bundles: Bundles, tmp_path: Path) -> None:
    import onnx_ir as ir

    bundle = bundles.open("llama", "ort")
    model = ir.load(bundle.file("model.onnx"))
    value = model.graph.initializers["model.layers.1.self_attn.k_proj.weight"].const_value
    assert isinstance(value, ir.ExternalTensor)
    bad = damaged(bundle, tmp_path / "bad", "model.onnx.data", value.offset or 0, value.length or 0)
    report = verify(bundles.options("llama", "ort"), bad)
    assert not report["passed"]
    assert report["first_diverging_layer"] == 1


def test_a_failed_verification_is_an_export_error(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {
        "passed": False,
        "judged_by": "cosine",
        "cosine": 0.5,
        "expected_cosine": 0.9999,
        "first_diverging_layer": 3,
    }

    def child(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 0, json.dumps(report), "")

    monkeypatch.setattr(subprocess, "run", child)
    bundle = bundles.open("llama", "ort")
    with pytest.raises(ExportError, match=r"cosine 0.5.*expected at least 0.9999.*diverges in layer 3"):
        verify_in_child(bundles.options("llama", "ort"), bundle)


def test_a_verification_that_cannot_run_says_why(bundles: Bundles) -> None:
    options = dataclasses.replace(bundles.options("llama", "ort"), model="/nowhere")
    with pytest.raises(ExportError, match=r"the verification could not run: .*nowhere") as caught:
        verify_in_child(options, bundles.open("llama", "ort"))
    assert caught.value.hint is not None and "--no-verify" in caught.value.hint
