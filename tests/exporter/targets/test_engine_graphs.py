"""What goes to a TensorRT device, run by ONNX Runtime: logits against the modules on the stored weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter.graph_session import GraphEngine
from cpm_edge.exporter.verify import verify
from tests.exporter.targets.conftest import FORMS
from tests.exporter.test_pipeline import CHUNKINGS, Logits, feed
from tests.support.bundles import Bundles

# float16 products over logits of standard deviation 3; the worst of 333 rows was 0.032.
TOLERANCE = 0.06


def run(engines: Bundles, variant: str, chunks: list[int], **options: Any) -> tuple[Logits, Logits]:
    """Logits of the graph, and of the modules on the same weights."""
    bundle = engines.open(variant, **options)
    with GraphEngine(bundle).session() as session:
        got = feed(session, engines.prompt, chunks)
    return got, engines.stored(variant, **options)


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("variant", "weight_format"), [("llama", "int4"), ("sparse", "int4"), ("sala", "int8")]
)
def test_logits_at_every_position(
    engines: Bundles, variant: str, weight_format: str, form: str, chunks: list[int]
) -> None:
    got, expected = run(engines, variant, chunks, weight_format=weight_format, **FORMS[form])
    error = np.abs(got - expected).max(1)
    # Rounding may turn which blocks a row reads, which changes later rows too; dense rows choose nothing.
    assert error[:63].max() < TOLERANCE and np.median(error) < TOLERANCE / 3
    assert (error > TOLERANCE).mean() < (0.15 if variant == "sparse" else 1e-9)


@pytest.mark.filterwarnings("ignore:TensorRT reads all 8 experts")
@pytest.mark.parametrize(
    ("variant", "weight_format"),
    [
        ("minicpm3", "int4"),
        ("minicpm3-untied", "fp16"),
        ("moe", "int4"),
        ("fatrelu", "fp16"),
        ("longrope", "int8"),
        ("ternary-mixed", "ternary"),
        ("gptq", "auto"),
    ],
)
def test_other_models_and_formats_in_standard_operators(
    engines: Bundles, variant: str, weight_format: str
) -> None:
    options = {"weight_format": weight_format, **FORMS["stock"]}
    got, expected = run(engines, variant, CHUNKINGS["odd chunks"], **options)
    error = np.abs(got - expected).max(1)
    chooses = variant in ("moe", "fatrelu")
    assert np.median(error) < TOLERANCE
    assert (error > TOLERANCE).mean() < (0.25 if chooses else 1e-9)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("ternary-mixed", {"weight_format": "ternary"}),
        ("gptq-act-order-asym", {"weight_format": "auto"}),
        ("tied-mha", {"weight_format": "fp16"}),
        ("sparse-group3", {"weight_format": "int4", "group_size": 64, "symmetric": False}),
    ],
)
def test_other_models_and_formats_with_plugins(
    engines: Bundles, variant: str, options: dict[str, Any]
) -> None:
    got, expected = run(engines, variant, CHUNKINGS["odd chunks"], **options, **FORMS["native"])
    error = np.abs(got - expected).max(1)
    assert np.median(error) < TOLERANCE
    assert (error > TOLERANCE).mean() < (0.15 if variant == "sparse-group3" else 1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["sparse", "sala"])
def test_a_good_bundle_is_verified(engines: Bundles, variant: str, form: str) -> None:
    options = {"weight_format": "int4" if variant == "sparse" else "int8", **FORMS[form]}
    asked = dataclasses.replace(engines.options(variant, **options), verify_tokens=150)
    report = verify(asked, engines.open(variant, **options))
    assert report["passed"] and report["first_diverging_layer"] is None
    assert report["judged_by"] == "median_cosine" and report["sparse_rows"] == 87
    assert report["median_cosine"] > 0.9999 and report["against_checkpoint"]["kl"] > 5 * report["kl"]


@pytest.mark.parametrize("form", FORMS)
def test_sessions_rewind_and_fork(engines: Bundles, form: str) -> None:
    options = {"weight_format": "int8", **FORMS[form]}
    expected = engines.stored("sala", **options)
    ids = engines.prompt
    with GraphEngine(engines.open("sala", **options)).session() as session:
        session.forward(ids[:100])
        twin = session.fork()
        session.forward(ids[:30])
        session.rewind(30)
        for each in (session, twin):
            assert np.abs(each.forward(ids[100:120]) - expected[119]).max() < TOLERANCE
