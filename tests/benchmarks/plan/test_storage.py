"""Bytes of weight files, against those of real exports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpm_edge.benchmarks.plan import PlanError
from cpm_edge.benchmarks.plan.shape import ModelShape
from cpm_edge.benchmarks.plan.storage import Format, Formats, weight_bytes
from tests.source_tree import ROOT

CONFIGS = ROOT / "tests/data/configs"
# Config, target, flavour, format of the linear layers, bytes of the file that an export wrote.
EXPORTED = [
    ("smollm2-135m", "ort", "", Format("int4", 32), 97497216),
    ("smollm2-135m", "ort", "", Format("int8"), 143700096),
    ("smollm2-135m", "ort", "", Format("bf16"), 269209728),
    ("smollm2-135m", "aipc", "stock", Format("int4", 32), 89120896),
    ("smollm2-135m", "aipc", "stock", Format("int8"), 135692416),
    ("smollm2-135m", "aipc", "stock", Format("fp16"), 269213824),
    ("smollm2-135m", "aipc", "native", Format("int4", 32), 117039232),
    ("smollm2-135m", "aipc", "native", Format("int8"), 163856512),
    ("minicpm4-0.5b", "ort", "", Format("int4", 32), 301015168),
    ("minicpm4-0.5b", "ort", "", Format("int4", 64, symmetric=False), 281550976),
    ("minicpm4-0.5b", "aipc", "stock", Format("int4", 32), 277282944),
    ("minicpm4-0.5b", "aipc", "native", Format("int4", 32), 352641152),
    ("minicpm4-0.5b", "aipc", "native", Format("int4", 128, symmetric=False), 338681984),
    ("minicpm4-8b", "ort", "", Format("int4", 32), 5354798698),  # with its other files
    ("minicpm4-8b", "aipc", "native", Format("int4", 32), 4868657408),
    ("minicpm4-8b", "aipc", "stock", Format("int4", 32), 4868657408),
]


@pytest.mark.parametrize(
    ("config", "target", "flavour", "linear", "exported"),
    EXPORTED,
    ids=[f"{c}-{t}{f}-{w.describe()}" for c, t, f, w, _ in EXPORTED],
)
def test_a_weight_file_has_the_predicted_size(
    config: str, target: str, flavour: str, linear: Format, exported: int
) -> None:
    shape = ModelShape.read(CONFIGS / f"{config}.json")
    group = linear.group or None
    formats = Formats.settle(shape, linear.name, group, linear.symmetric)
    assert formats.linear == linear
    assert weight_bytes(shape, formats, target, flavour).total == pytest.approx(exported, rel=0.003)


def test_the_groups_of_a_quantized_checkpoint_are_taken() -> None:
    shape = ModelShape.read(CONFIGS / "minicpm4-8b.json")
    content = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert Formats.settle(replace(shape, quantized=content), "auto", None, True).linear == Format("int4", 128)
    assert Formats.settle(shape, "auto", None, True).linear == Format("int4", 32)


def test_the_native_flavour_has_no_floats() -> None:
    shape = ModelShape.read(CONFIGS / "minicpm4-0.5b.json")
    with pytest.raises(PlanError, match="native flavour, got fp16"):
        weight_bytes(shape, Formats.settle(shape, "fp16", None, True), "aipc", "native")


@pytest.mark.parametrize(
    ("fields", "message"), [(("int3", None), "--weight-format"), (("int4", 48), "--group-size")]
)
def test_unknown_formats_are_refused(fields: tuple[str, int | None], message: str) -> None:
    shape = ModelShape.read(CONFIGS / "minicpm4-0.5b.json")
    with pytest.raises(PlanError, match=message):
        Formats.settle(shape, *fields, True)


def test_one_token_reads_a_few_experts_and_one_row_of_the_embedding() -> None:
    shape = ModelShape.read(CONFIGS / "minicpm-moe-8x2b.json")
    found = weight_bytes(shape, Formats.settle(shape, "int4", 32, True), "aipc", "stock")
    expected = found.file["linear"] + found.file["expert"] / 4 + found.file["embedding"]
    assert found.read == pytest.approx(expected, rel=1e-4)
