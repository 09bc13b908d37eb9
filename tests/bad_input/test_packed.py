"""Damaged GPTQ, AWQ, Marlin and trained checkpoints: refused by name, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.bad_input.bench import Bench
from tests.support.checkpoints import config_of, stored_of, write_checkpoint
from tests.support.packed import Raw

UP = "model.layers.1.mlp.up_proj"
TARGETS = {"ort": ("ort", ()), "stock": ("aipc", ()), "native": ("aipc", ("--flavour", "native"))}


def cut(part: str, *shape: slice) -> Callable[[Raw], None]:
    def damage(raw: Raw) -> None:
        raw[f"{UP}.{part}"] = np.ascontiguousarray(raw[f"{UP}.{part}"][shape])

    return damage


def put(part: str, index: Any, value: Any) -> Callable[[Raw], None]:
    def damage(raw: Raw) -> None:
        raw[f"{UP}.{part}"][index] = value

    return damage


def cast(part: str, dtype: Any) -> Callable[[Raw], None]:
    def damage(raw: Raw) -> None:
        raw[f"{UP}.{part}"] = raw[f"{UP}.{part}"].astype(dtype)

    return damage


def drop(part: str) -> Callable[[Raw], None]:
    def damage(raw: Raw) -> None:
        del raw[f"{UP}.{part}"]

    return damage


def twice(raw: Raw) -> None:
    raw[f"{UP}.weight"] = np.zeros((512, 256), np.float32)


def fused(raw: Raw) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        raw[f"model.layers.0.self_attn.qkv_proj.{part}"] = raw.pop(f"model.layers.0.self_attn.q_proj.{part}")


AFFINE = ("scales", "qzeros")
DAMAGED = "download or copy the checkpoint again"
# Variant, damage, what the error says, hint.
DAMAGES: dict[str, tuple[str, Callable[[Raw], None], list[str], str]] = {
    "truncated qweight": (
        "gptq",
        cut("qweight", slice(0, 28)),
        [f"{UP}.qweight", "expected a multiple of 128 columns (the group size), got 224"],
        DAMAGED,
    ),
    "missing groups of scales alone": (
        "gptq",
        cut("scales", slice(0, 1)),
        [f"{UP}.scales", "expected 2 groups", "got 1"],
        DAMAGED,
    ),
    "truncated rows": (
        "gptq",
        cut("qweight", slice(None), slice(0, 500)),
        [f"{UP}.qweight", "expected [columns / 8, 512]", "got [32, 500]"],
        DAMAGED,
    ),
    "truncated awq": (
        "awq",
        cut("qweight", slice(0, 128)),
        [f"{UP}.scales", "expected 1 groups (128 columns, group size 128), got 2"],
        DAMAGED,
    ),
    "missing groups": (
        "awq",
        lambda raw: (cut("scales", slice(0, 1))(raw), cut("qzeros", slice(0, 1))(raw))[0],
        [f"{UP}.scales", "expected 2 groups", "got 1"],
        DAMAGED,
    ),
    "groups of zero points": (
        "gptq",
        cut("qzeros", slice(0, 1)),
        [f"{UP}.qzeros", "[2, 64]", "[1, 64]"],
        DAMAGED,
    ),
    "missing groups of gptq": (
        "gptq-asym",
        lambda raw: (cut("scales", slice(0, 7))(raw), cut("qzeros", slice(0, 7))(raw))[0],
        [f"{UP}.scales", "expected 8 groups (256 columns, group size 32), got 7"],
        DAMAGED,
    ),
    "missing groups of marlin": (
        "marlin",
        cut("s", slice(0, 1)),
        [f"{UP}.s", "expected 2 groups", "got 1"],
        DAMAGED,
    ),
    "too many groups": (
        "awq",
        lambda raw: raw.update({f"{UP}.{part}": np.repeat(raw[f"{UP}.{part}"], 2, 0) for part in AFFINE}),
        [f"{UP}.scales", "expected 2 groups", "got 4"],
        DAMAGED,
    ),
    "truncated marlin": (
        "marlin",
        cut("B", slice(0, 15)),
        [f"{UP}.B", "expected a multiple of 128 columns (the group size), got 240"],
        DAMAGED,
    ),
    "truncated rows of awq": (
        "awq",
        cut("qweight", slice(None), slice(0, 63)),
        [f"{UP}.qweight", "expected [columns, 512 / 8]", "got [256, 63]"],
        DAMAGED,
    ),
    "a zero scale": (
        "gptq",
        put("scales", (1, 77), 0),
        [f"{UP}.scales", "row 77 has the scale 0.0 in group 1"],
        "download it again",
    ),
    "a scale that is none": (
        "awq",
        put("scales", (0, 5), np.nan),
        [f"{UP}.scales", "row 5", "nan"],
        "damaged",
    ),
    "a zero awq scale": (
        "awq",
        put("scales", (1, 77), 0),
        [f"{UP}.scales", "row 77 has the scale 0.0 in group 1"],
        "damaged",
    ),
    "an infinite scale": ("gptq", put("scales", (0, 5), np.inf), [f"{UP}.scales", "row 5", "inf"], "damaged"),
    "a zero marlin scale": ("marlin", put("s", (1, 0), 0), [f"{UP}.s", "row 0 has the scale 0.0"], "damaged"),
    "a group that does not exist": (
        "gptq-act-order",
        put("g_idx", 9, 2),
        [f"{UP}.g_idx", "expected groups within [0, 2), got 2 for column 9"],
        DAMAGED,
    ),
    "a group before the first": (
        "gptq",
        put("g_idx", 9, -1),
        [f"{UP}.g_idx", "expected groups within [0, 2), got -1 for column 9"],
        DAMAGED,
    ),
    "a truncated g_idx": (
        "gptq-act-order",
        cut("g_idx", slice(0, 255)),
        [f"{UP}.g_idx", "expected shape [256], got [255]"],
        DAMAGED,
    ),
    "a group of another width": (
        "gptq-act-order",
        put("g_idx", slice(None), np.arange(256) // 129),
        [f"{UP}.g_idx", "group 0 has 129 of 256 columns"],
        DAMAGED,
    ),
    "zero points that are not those of sym": (
        "gptq",
        put("qzeros", (0, 3), 0x77777776),
        [f"{UP}.qzeros", "zero point 8 everywhere", "got 7 in row 24, group 0"],
        'checkpoint_format is "gptq_v2"',
    ),
    "a zero point of 16": (
        "gptq-asym",
        put("qzeros", (0, 3), -1),
        [f"{UP}.qzeros", "row 24 stores the zero point 15"],
        "gptq_v2",
    ),
    "words of 64 bits": (
        "gptq",
        cast("qweight", np.int64),
        [f"{UP}.qweight", "expected I32, got I64"],
        DAMAGED,
    ),
    "scales of bytes": ("awq", cast("scales", np.int8), [f"{UP}.scales", "F16 or BF16", "got I8"], DAMAGED),
    "no scales": ("awq", drop("scales"), [f"{UP}.scales", "not in the checkpoint"], DAMAGED),
    "no codes": ("awq", drop("qweight"), [f"{UP}.qzeros", "codes are missing"], DAMAGED),
    "floats too": ("gptq", twice, [f"{UP}.weight is there", "expected one of them"], DAMAGED),
    "fused for CPM.cu": (
        "gptq",
        fused,
        ["qkv_proj.qweight", "fused"],
        "GPTQ checkpoint that it was converted",
    ),
}


@pytest.mark.parametrize(("variant", "damage", "words", "hint"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(
    bench: Bench, variant: str, damage: Callable[[Raw], None], words: list[str], hint: str
) -> None:
    stored = stored_of(variant)
    damage(stored)
    write_checkpoint(bench.checkpoint, config_of(variant), stored)
    bench.export_fails().says(*words, hint=hint)


@pytest.mark.parametrize(("target", "flavour"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    "name", ["a zero scale", "a zero awq scale", "a zero marlin scale", "a group that does not exist"]
)
def test_damage_is_named_for_every_target(
    bench: Bench, target: str, flavour: tuple[str, ...], name: str
) -> None:
    variant, damage, words, hint = DAMAGES[name]
    stored = stored_of(variant)
    damage(stored)
    write_checkpoint(bench.checkpoint, config_of(variant), stored)
    bench.export_fails(*flavour, target=target).says(*words, hint=hint)


def test_a_matrix_of_another_model(bench: Bench) -> None:
    write_checkpoint(bench.checkpoint, config_of("gptq") | {"intermediate_size": 480}, stored_of("gptq"))
    bench.export_fails().says("gate_proj.weight", "[480, 256]", "got [512, 256]", hint="different models")


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "fp8"])
def test_other_methods(bench: Bench, method: str) -> None:
    bench.edit("config.json", quantization_config={"quant_method": method})
    bench.export_fails().says("expected gptq or awq", method, hint="export the unquantized checkpoint")


@pytest.mark.parametrize(
    ("size", "hint"), [("32", "leave --group-size out"), ("64", "leave --group-size out")]
)
def test_a_group_size_that_the_checkpoint_does_not_have(bench: Bench, size: str, hint: str) -> None:
    write_checkpoint(bench.checkpoint, config_of("gptq"), stored_of("gptq"))
    bench.export_fails("--group-size", size).says(f"--group-size {size}", "int4 g128 sym", hint=hint)


def test_zero_points_that_the_checkpoint_does_not_have(bench: Bench) -> None:
    write_checkpoint(bench.checkpoint, config_of("gptq"), stored_of("gptq"))
    bench.export_fails("--asym").says("--asym", "int4 g128 sym", hint="leave --asym out")


def test_scales_that_float16_does_not_hold(bench: Bench) -> None:
    write_checkpoint(bench.checkpoint, config_of("gptq-wide"), stored_of("gptq-wide"))
    refusal = bench.export_fails("--flavour", "native", target="aipc")
    refusal.says("q_proj.weight", "float16 scales", hint="--flavour stock")


def test_column_orders_that_the_native_flavour_cannot_share(bench: Bench) -> None:
    stored = stored_of("gptq-act-order")
    key = "model.layers.0.self_attn.k_proj.g_idx"
    stored[key] = np.ascontiguousarray(stored[key][::-1])
    write_checkpoint(bench.checkpoint, config_of("gptq-act-order"), stored)
    refusal = bench.export_fails("--flavour", "native", target="aipc")
    refusal.says("layers.0.self_attn", "different column orders", hint="--flavour stock")
    assert bench.export("--flavour", "stock", target="aipc").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "linear"),
    [
        (("--weight-format", "int4"), "int4 g128 sym"),
        (("--weight-format", "int4", "--group-size", "128"), "int4 g128 sym"),
        (("--weight-format", "int4", "--group-size", "64"), "int4 g64 sym"),
        (("--weight-format", "int4", "--asym"), "int4 g32 asym"),
        (("--weight-format", "int8"), "int8 row sym"),
    ],
)
def test_a_format_asked_for(bench: Bench, arguments: tuple[str, ...], linear: str) -> None:
    """Its own is taken as it is; another one rounds, with a word about it."""
    write_checkpoint(bench.checkpoint, config_of("gptq"), stored_of("gptq"))
    result = bench.export(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["weights"]["linear"] == linear
    again = [text for text in report["warnings"] if "quantizes them again" in text]
    assert len(again) == (0 if linear == "int4 g128 sym" else 1)


@pytest.mark.parametrize(("value", "told"), [(0, 0), (0.5, 1)])
def test_biases_that_the_model_does_not_have(bench: Bench, value: float, told: int) -> None:
    """Old tools write a bias of zeros for every matrix; another one is worth a word."""
    stored = stored_of("gptq") | {f"{UP}.bias": np.full(512, value, np.float16)}
    write_checkpoint(bench.checkpoint, config_of("gptq"), stored)
    report = json.loads(bench.export("--json").stdout)
    assert len(report["warnings"]) == told


@pytest.mark.parametrize(("target", "flavour"), TARGETS.values(), ids=TARGETS)
def test_one_trained_weight_off_the_grid(bench: Bench, target: str, flavour: tuple[str, ...]) -> None:
    stored = stored_of("qat")
    weight = stored[f"{UP}.weight"]
    column = 128 + int(np.abs(weight[77, 128:160].astype(np.float32)).argmax())
    weight[77, column] *= 1.01
    write_checkpoint(bench.checkpoint, config_of("qat"), stored)
    refusal = bench.export_fails(*flavour, target=target)
    refusal.says(
        f"tensor {UP}.weight: row 77 is not on a grid", "columns 128 to 159", hint="--weight-format int4"
    )
    assert bench.export("--weight-format", "int4", "--group-size", "32").exit_code == 0


def test_a_trained_weight_that_is_no_number(bench: Bench) -> None:
    stored = stored_of("qat")
    stored[f"{UP}.weight"][77, 9] = np.nan
    write_checkpoint(bench.checkpoint, config_of("qat"), stored)
    bench.export_fails().says(f"tensor {UP}.weight: row 77 holds NaN or infinity", hint="damaged")


def test_a_trained_matrix_whose_groups_are_cut(bench: Bench) -> None:
    stored = stored_of("qat")
    stored[f"{UP}.weight"] = np.ascontiguousarray(stored[f"{UP}.weight"][:, :224])
    write_checkpoint(bench.checkpoint, config_of("qat"), stored)
    bench.export_fails().says(f"tensor {UP}.weight", "[512, 256]", "got [512, 224]", hint="different models")


def test_trained_scales_that_float16_does_not_hold(bench: Bench) -> None:
    write_checkpoint(bench.checkpoint, config_of("qat-wide"), stored_of("qat-wide"))
    refusal = bench.export_fails("--flavour", "native", target="aipc")
    refusal.says("q_proj.weight", "float16 scales", hint="--flavour stock")


@pytest.mark.parametrize(
    ("arguments", "linear", "words"),
    [
        ((), "int4 g128 sym", 0),
        (("--weight-format", "int4"), "int4 g128 sym", 0),
        (("--weight-format", "int4", "--group-size", "32"), "int4 g32 sym", 1),
        (("--weight-format", "int8"), "int8 row sym", 1),
        (("--weight-format", "bf16"), "bf16", 0),
    ],
)
def test_a_format_asked_for_trained_weights(
    bench: Bench, arguments: tuple[str, ...], linear: str, words: int
) -> None:
    write_checkpoint(bench.checkpoint, config_of("qat"), stored_of("qat"))
    result = bench.export(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["weights"]["linear"] == linear
    assert sum("by their training and" in text for text in report["warnings"]) == words
