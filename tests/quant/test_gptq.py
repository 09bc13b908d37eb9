"""GPTQ against the textbook form with the inverse, and what it promises."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.quant import Quantized, quantize_int4
from cpm_edge.quant.gptq import BLOCK, gptq
from cpm_edge.quant.grid_search import search_grid
from cpm_edge.quant.hessian import output_power
from cpm_edge.quant.scales import Floats
from tests.quant.test_hessian import inputs

Seed = st.integers(0, 2**32 - 1)


def problem(rows: int, cols: int, seed: int) -> tuple[Floats, Floats]:
    """A matrix and the second moment of correlated inputs."""
    x = inputs(3 * cols, cols, seed)
    weight = np.random.default_rng(seed + 1).standard_normal((rows, cols)).astype(np.float32)
    moment = (x.T.astype(np.float64) @ x / len(x)).astype(np.float32)
    return weight, ((moment + moment.T) / 2).astype(np.float32)


def textbook(weight: Floats, moment: Floats, grid: Quantized, damping: float) -> npt.NDArray[np.float64]:
    """Algorithm 1 of the GPTQ paper in double precision, static groups, columns in their order."""
    cols = weight.shape[1]
    damped = moment.astype(np.float64) + damping * moment.diagonal().mean() * np.eye(cols)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, values = weight.astype(np.float64), np.zeros(weight.shape)
    for k in range(cols):
        scale = grid.scales[:, k // grid.group_width].astype(np.float64)
        zero = grid.zero_points()[:, k // grid.group_width].astype(np.float64)
        values[:, k] = (np.clip(np.rint(left[:, k] / scale) + zero, 0, 15) - zero) * scale
        error = (left[:, k] - values[:, k]) / inverse[k, k]
        left[:, k + 1 :] -= np.outer(error, inverse[k, k + 1 :])
    return values


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_codes_are_those_of_the_textbook(symmetric: bool) -> None:
    weight, moment = problem(24, 2 * BLOCK + 32, 3)
    grid = quantize_int4(weight, 32, symmetric)
    got = gptq(weight, moment.copy(), grid, act_order=False, refinements=0).matrix.dequantize()
    same = np.isclose(got, textbook(weight, moment, grid, 0.01), atol=1e-5)
    assert (
        same.mean() > 0.98
    )  # float32 against float64: a code that is nearly a tie may turn, and what follows


@given(Seed, st.booleans(), st.booleans())
@settings(max_examples=20)
def test_it_costs_the_outputs_less_than_rounding(seed: int, symmetric: bool, act_order: bool) -> None:
    weight, moment = problem(16, 96, seed)
    grid = quantize_int4(weight, 32, symmetric)
    result = gptq(weight, moment.copy(), grid, act_order=act_order)
    cost = output_power(weight - result.matrix.dequantize(), moment).sum()
    assert cost < output_power(weight - grid.dequantize(), moment).sum()
    # What it reports is the cost under the damped moment.
    damped = moment + np.float32(result.damping * moment.diagonal().mean()) * np.eye(96, dtype=np.float32)
    own = output_power(weight - result.matrix.dequantize(), damped)
    np.testing.assert_allclose(result.cost, own, rtol=2e-2, atol=1e-4 * own.max())


@given(Seed)
@settings(max_examples=10)
def test_uncorrelated_inputs_leave_the_codes_alone(seed: int) -> None:
    weight, _ = problem(8, 64, seed)
    grid = quantize_int4(weight, 32, True)
    moment = np.diag(np.random.default_rng(seed).random(64) + 0.1).astype(np.float32)
    np.testing.assert_array_equal(gptq(weight, moment, grid, refinements=0).matrix.codes, grid.codes)


def test_scales_and_zero_points_stay_and_groups_stay_together() -> None:
    weight, moment = problem(8, 64, 5)
    grid = quantize_int4(weight, 32, False)
    matrix = gptq(weight, moment, grid, act_order=True, refinements=0).matrix
    np.testing.assert_array_equal(matrix.scales, grid.scales)
    assert matrix.zeros is grid.zeros
    assert matrix.scheme == grid.scheme


@given(Seed, st.sampled_from([32, 64]), st.booleans())
@settings(max_examples=20)
def test_searched_grids_cost_no_group_more(seed: int, group: int, symmetric: bool) -> None:
    weight, moment = problem(12, 128, seed)
    plain, searched = quantize_int4(weight, group, symmetric), search_grid(weight, moment, group, symmetric)
    assert searched.scheme == plain.scheme
    for start in range(0, 128, group):
        part = slice(start, start + group)
        costs = [
            output_power(weight[:, part] - q.dequantize()[:, part], moment[part, part])
            for q in (searched, plain)
        ]
        assert (costs[0] <= costs[1] * (1 + 1e-4) + 1e-9).all()
