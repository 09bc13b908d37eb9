"""Refinement: every step is the best there is, and what it says it gains is what is gained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.quant import Quantized, quantize_int4
from cpm_edge.quant.gptq import gptq
from cpm_edge.quant.hessian import output_power
from cpm_edge.quant.scales import Floats
from tests.quant.test_gptq import Seed, problem

MANY = 60  # enough for small matrices to come to rest


def damped(moment: Floats, share: float) -> Floats:
    return moment + np.float32(share * moment.diagonal().mean()) * np.eye(len(moment), dtype=np.float32)


def cost_of(weight: Floats, matrix: Quantized, moment: Floats) -> npt.NDArray[np.float64]:
    return output_power(weight - matrix.dequantize(), moment)


@given(Seed, st.booleans(), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=20)
def test_each_walk_costs_no_row_more_and_reports_its_gain(
    seed: int, symmetric: bool, act_order: bool, walks: int
) -> None:
    weight, moment = problem(12, 96, seed)
    grid = quantize_int4(weight, 32, symmetric)
    before, after = (
        gptq(weight, moment.copy(), grid, act_order=act_order, refinements=count)
        for count in (walks - 1, walks)
    )
    true = cost_of(weight, after.matrix, damped(moment, after.damping))
    assert (after.cost <= before.cost * (1 + 1e-6)).all() and after.cost.sum() < before.cost.sum()
    np.testing.assert_allclose(after.cost, true, rtol=1e-3)
    assert after.matrix.scheme == grid.scheme
    assert after.matrix.zeros is grid.zeros
    np.testing.assert_array_equal(
        after.matrix.scales, after.matrix.scales.astype(np.float16).astype(np.float32)
    )


@given(Seed, st.booleans())
@settings(max_examples=5)
def test_at_rest_no_other_code_and_no_other_scale_is_better(seed: int, symmetric: bool) -> None:
    weight, moment = problem(3, 32, seed)
    result = gptq(weight, moment.copy(), quantize_int4(weight, 16, symmetric), refinements=MANY)
    matrix, full = result.matrix, damped(moment, result.damping)
    least = cost_of(weight, matrix, full) * (1 - 1e-4)
    for column in range(32):
        for step in (-1, 1):
            codes = matrix.codes.copy()
            codes[:, column] = np.clip(codes[:, column].astype(int) + step, 0, 15)
            assert (
                cost_of(weight, Quantized(codes, matrix.scales, matrix.zeros, matrix.scheme), full) >= least
            ).all()
    for group in range(2):
        for towards in (np.float16(np.inf), np.float16(-np.inf)):
            scales = matrix.scales.astype(np.float16)
            scales[:, group] = np.nextafter(scales[:, group], towards)
            other = Quantized(matrix.codes, scales.astype(np.float32), matrix.zeros, matrix.scheme)
            assert (cost_of(weight, other, full) >= least).all()


def test_zero_groups_and_inputs_that_are_always_zero_stay_finite() -> None:
    weight, moment = problem(4, 64, 1)
    weight[:, :32] = weight[0] = 0
    moment[40:48] = moment[:, 40:48] = 0
    result = gptq(weight, moment.copy(), quantize_int4(weight, 32, True))
    true = cost_of(weight, result.matrix, damped(moment, result.damping))
    np.testing.assert_allclose(result.cost, true, rtol=1e-3)
    np.testing.assert_array_equal(result.matrix.dequantize()[0], 0)


@pytest.mark.parametrize("refinements", [0, 1])
def test_a_matrix_on_its_grid_stays(refinements: int) -> None:
    weight, moment = problem(8, 64, 2)
    grid = quantize_int4(weight, 32, True)
    result = gptq(grid.dequantize(), moment, grid, refinements=refinements)
    np.testing.assert_array_equal(result.matrix.dequantize(), grid.dequantize())
    assert result.cost.max() == 0
