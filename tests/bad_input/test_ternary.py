"""Weights that should be ternary and are not: refused by name, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from tests.bad_input.bench import Bench
from tests.support.checkpoints import TERNARY_WIDE, config_of, linear_names, tensors_of, write_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"
Weight = npt.NDArray[np.float32]

TARGETS = {"ort": ("ort", ()), "stock": ("aipc", ()), "native": ("aipc", ("--flavour", "native"))}
for_targets = pytest.mark.parametrize(("target", "flavour"), TARGETS.values(), ids=TARGETS)


def fourth_value(weight: Weight) -> None:
    column = 32 * 3 + int(np.flatnonzero(weight[77, 96:128] == 0)[0])
    weight[77, column] = 0.5


def two_magnitudes(weight: Weight) -> None:
    """Half a group scaled, within the smallest groups."""
    weight[77, 96:112] *= 2


def not_a_number(weight: Weight) -> None:
    weight[77, 100] = np.nan


DAMAGES: dict[str, tuple[Callable[[Weight], None], list[str], str]] = {
    "a fourth value": (fourth_value, ["row 77 is not ternary", "columns 96 to 127", "0.5"], "int4"),
    "two magnitudes": (two_magnitudes, ["row 77 is not ternary", "columns 96 to 127"], "int4"),
    "not a number": (not_a_number, ["row 77 holds NaN or infinity"], "damaged"),
}


@for_targets
@pytest.mark.parametrize("weight_format", ["auto", "ternary"])
@pytest.mark.parametrize(("damage", "words", "hint"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tensor_is_named(
    bench: Bench,
    target: str,
    flavour: tuple[str, ...],
    weight_format: str,
    damage: Callable[[Weight], None],
    words: list[str],
    hint: str,
) -> None:
    tensors = tensors_of("ternary")
    damage(tensors[UP])
    write_checkpoint(bench.checkpoint, config_of("ternary"), tensors)
    refusal = bench.export_fails("--weight-format", weight_format, *flavour, target=target)
    refusal.says(f"tensor {UP}: ", *words, hint=hint)


def test_damage_in_the_sampled_rows_does_not_turn_auto_to_int4(bench: Bench) -> None:
    tensors = tensors_of("ternary")
    for name in linear_names(tensors)[::4]:
        tensors[name][len(tensors[name]) // 2, :2] = [0.5, 0.25]
    write_checkpoint(bench.checkpoint, config_of("ternary"), tensors)
    bench.export_fails().says("row", "is not ternary", "0.25, 0.5", hint="--weight-format int4")


def test_an_ordinary_checkpoint_is_not_ternary(bench: Bench) -> None:
    refusal = bench.export_fails("--weight-format", "ternary")
    refusal.says("tensor model.layers.0.", "row 0 is not ternary", "more", hint="--weight-format int4")


@pytest.mark.parametrize("size", ["32", "64"])
def test_a_group_size_that_the_weights_do_not_have(bench: Bench, size: str) -> None:
    write_checkpoint(bench.checkpoint, config_of("ternary"), tensors_of("ternary"))
    refusal = bench.export_fails("--group-size", size)
    refusal.says(f"--group-size {size}", "is ternary g128", hint="leave --group-size out")


def test_the_group_size_that_the_weights_have(bench: Bench) -> None:
    write_checkpoint(bench.checkpoint, config_of("ternary"), tensors_of("ternary"))
    result = bench.export("--group-size", "128", "--json")
    assert result.exit_code == 0, result.stderr
    weights = json.loads(result.stdout)["weights"]
    assert (weights["linear"], weights["other_groups"]) == ("ternary g128", {})


def test_zero_points_for_ternary_weights(bench: Bench) -> None:
    write_checkpoint(bench.checkpoint, config_of("ternary"), tensors_of("ternary"))
    bench.export_fails("--asym").says("asymmetric", "linear layers are ternary", hint="choose int4")


def test_the_native_flavour_keeps_float16_scales(bench: Bench) -> None:
    write_checkpoint(bench.checkpoint, config_of(TERNARY_WIDE), tensors_of(TERNARY_WIDE))
    refusal = bench.export_fails("--flavour", "native", target="aipc")
    refusal.says("q_proj.weight", "float16 scales", hint="--flavour stock")


def test_columns_that_do_not_fill_bytes(bench: Bench) -> None:
    config = config_of("ternary") | {"intermediate_size": 90}
    tensors = tensors_of("ternary")
    for name in linear_names(tensors):
        if "gate" in name or "up" in name:
            tensors[name] = tensors[name][:90].copy()
        if "down" in name:
            tensors[name] = np.sign(tensors[name][:, :90])
    write_checkpoint(bench.checkpoint, config, tensors)
    bench.export_fails().says(
        "down_proj.weight", "multiple of 4 columns, got 90", hint="--weight-format int8"
    )
