"""Second moments and their factors, against numpy in double precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import QuantError, hessian
from cpm_edge.quant.hessian import Hessian, factorise, mirror, output_power, permute, rescale
from cpm_edge.quant.scales import Floats

SIZES = st.integers(1, 70)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripes and blocks that small matrices have several of."""
    monkeypatch.setattr(hessian, "STRIPE", 24)
    monkeypatch.setattr(hessian, "BLOCK", 16)


def inputs(rows: int, cols: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, cols)) @ (np.eye(cols) + 0.3 * rng.standard_normal((cols, cols)))
    return (mixed * np.exp(rng.standard_normal(cols))).astype(np.float32)


@given(SIZES, st.lists(st.integers(0, 9), min_size=1, max_size=4), SEEDS)
def test_batches_add_up_to_the_mean_outer_product(cols: int, batches: list[int], seed: int) -> None:
    rows = inputs(sum(batches), cols, seed)
    moment = Hessian(cols)
    for batch in np.split(rows, np.cumsum(batches)[:-1]):
        moment.add(batch)
    exact = rows.T.astype(np.float64) @ rows / max(len(rows), 1)
    assert moment.rows == len(rows)
    np.testing.assert_allclose(moment.finish(), exact, rtol=1e-4, atol=1e-4 * (np.abs(exact).max() + 1e-9))


def test_activations_that_are_not_finite() -> None:
    with pytest.raises(QuantError, match="not finite"):
        Hessian(4).add(np.array([[1, np.nan, 0, 0]], np.float32))


@given(SIZES, SEEDS)
def test_the_factor_gives_the_matrix_back_and_leaves_the_lower_half(cols: int, seed: int) -> None:
    rows = inputs(2 * cols + 2, cols, seed)
    matrix = rows.T @ rows
    mirror(matrix)
    factor = matrix.copy()
    assert factorise(factor, 0.01) == 0.01
    upper = np.triu(factor).astype(np.float64)
    expected = matrix + 0.01 * matrix.diagonal().mean() * np.eye(cols)
    np.testing.assert_allclose(upper @ upper.T, expected, rtol=1e-3, atol=1e-4 * matrix.diagonal().max())
    np.testing.assert_array_equal(np.tril(factor, -1), np.tril(matrix, -1))
    assert (upper.diagonal() > 0).all()


@given(SIZES, SEEDS)
def test_fewer_tokens_than_inputs_still_have_a_factor(cols: int, seed: int) -> None:
    rows = inputs(2, cols, seed)
    matrix = rows.T @ rows
    mirror(matrix)
    share = factorise(matrix.copy(), 1e-9)
    assert 1e-9 <= share <= 1


def test_inputs_that_are_always_zero() -> None:
    factor = np.zeros((20, 20), np.float32)
    factorise(factor, 0.01)
    np.testing.assert_allclose(np.triu(factor), 0.1 * np.eye(20), rtol=1e-5, atol=1e-7)


def test_a_matrix_that_no_damping_helps() -> None:
    with pytest.raises(QuantError, match="no positive second moment"):
        factorise(np.full((20, 20), np.nan, np.float32))


@given(SIZES, SEEDS)
def test_permuting_and_rescaling_in_place(cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((cols, cols)).astype(np.float32)
    order = rng.permutation(cols)
    moved = matrix.copy()
    permute(moved, order)
    np.testing.assert_array_equal(moved, matrix[np.ix_(order, order)])
    factors = np.exp(rng.standard_normal(cols)).astype(np.float32)
    rescale(moved, factors)
    exact = matrix[np.ix_(order, order)] * np.outer(factors, factors)
    np.testing.assert_allclose(moved, exact, rtol=1e-5)


def test_output_power_is_the_mean_square_of_outputs() -> None:
    rows, weight = inputs(50, 12, 1), inputs(5, 12, 2)
    moment = rows.T @ rows / np.float32(50)
    np.testing.assert_allclose(output_power(weight, moment), ((rows @ weight.T) ** 2).mean(0), rtol=1e-4)
