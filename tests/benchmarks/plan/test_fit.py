"""The constants of the profiles, against the published runs that had no part in them."""

from __future__ import annotations

import pytest

from cpm_edge.benchmarks.plan import chip, chips
from cpm_edge.benchmarks.plan.fit import WIDEST, Run, constants, decode_runs, fit, published
from cpm_edge.benchmarks.plan.shape import ModelShape
from cpm_edge.benchmarks.plan.speed import LATENT, Decode, decode, decode_seconds, first_token

RUNS = decode_runs(published())
HELD_OUT = [run for run in RUNS if run.held_out]


def rate(run: Run) -> float:
    known = chip(run.chip).devices[run.device].roofline
    assert known is not None
    return 1 / decode_seconds(run.read, 0, run.shape.layers, known.bandwidth, known.layer)


def test_the_profiles_hold_what_the_fit_gives() -> None:
    document = published()
    for each in chips().values():
        if "GPU" not in each.devices:
            continue
        found, device = constants(document, each.id), each.devices["GPU"]
        for key, value in (("roofline", device.roofline), ("prefill", device.prefill)):
            assert (found[key] is None) == (value is None), each.id
            for name, number in (found[key] or {}).items():
                expected = getattr(value, name)
                assert number == (pytest.approx(expected, rel=0.02) if name != "source" else expected), (
                    each.id
                )


def test_what_is_held_out() -> None:
    assert sorted({(run.chip, run.model) for run in HELD_OUT}) == [
        ("core-ultra-7-358h", "MiniCPM3-4B"),
        ("core-ultra-7-358h", "MiniCPM4-8B"),
        ("jetson-agx-orin-64gb", "Qwen3-4B"),
        ("jetson-orin-nx-16gb", "Qwen3-4B"),
    ]


@pytest.mark.parametrize("run", HELD_OUT, ids=lambda run: f"{run.chip}-{run.model}-{run.context}")
def test_a_held_out_run_is_inside_the_interval(run: Run) -> None:
    known = chip(run.chip).devices[run.device].roofline
    assert known is not None and known.spread <= WIDEST == 0.2
    low, high = rate(run) * (1 - known.spread), rate(run) * (1 + known.spread)
    if run.shape.is_latent:  # outside the model, and said so
        assert run.rate < high
        asked: Decode = decode(run.shape, run.read, 0, "fp16", chip(run.chip), chip(run.chip).devices["GPU"])
        assert asked.note == LATENT and asked.rate is not None and asked.rate.low is None
    else:
        assert low <= run.rate <= high


def test_every_fitted_run_is_inside_its_interval() -> None:
    for run in RUNS:
        known = chip(run.chip).devices[run.device].roofline
        assert known is not None
        if run.older:
            assert f"{run.model} {run.rate:g} tok/s" in known.source
        if not (run.held_out or run.older):
            assert abs(run.rate / rate(run) - 1) <= known.spread, run


def test_a_fit_of_exact_points_gives_their_constants() -> None:
    bandwidth, layer, spread = fit([1e9, 4e9, 2e9], [10, 30, 60], [0.02, 0.07, 0.08])
    assert bandwidth == pytest.approx(1e11)
    assert layer == pytest.approx(1e-3)
    assert spread == 0.1


def test_two_points_say_nothing_about_others() -> None:
    assert fit([1e9, 4e9], [10, 30], [0.02, 0.07])[2] == WIDEST


def test_layers_that_would_take_less_than_no_time_take_none() -> None:
    bandwidth, layer, _ = fit([1e9, 4e9, 5e9], [30, 30, 30], [0.008, 0.04, 0.051])
    assert layer == 0 and bandwidth > 0


def test_a_first_token_that_was_held_out_is_inside_the_interval() -> None:
    held_out = [
        (entry["chip"], row)
        for entry in published()["runs"]
        for row in entry["prefill"]
        if row.get("held_out")
    ]
    assert [name for name, _ in held_out] == ["jetson-agx-orin-64gb", "jetson-orin-nx-16gb"]
    for name, row in held_out:
        shape = ModelShape.read(published()["models"][row["model"]])
        seconds = first_token(shape, row["tokens"], chip(name).devices["GPU"]).seconds
        assert seconds is not None and seconds.low is not None
        assert seconds.low <= row["seconds"] <= seconds.high
