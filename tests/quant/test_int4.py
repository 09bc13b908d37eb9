from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpm_edge.quant import QuantError, pack_int4, pack_zeros_int4, quantize_int4, unpack_int4

from .strategies import Floats, weights, weights_and_group

HALF_STEP = 2.0**-11  # relative error of rounding a scale to float16


def in_groups(rows: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    return rows.reshape(rows.shape[0], -1, group)


@given(weights_and_group())
def test_symmetric_error_is_half_a_step_except_beyond_the_largest_code(case: tuple[Floats, int]) -> None:
    weight, group = case
    q = quantize_int4(weight, group, symmetric=True)
    error = np.abs(in_groups(q.dequantize(), group).astype(np.float64) - in_groups(weight, group))
    step = np.abs(q.scales.astype(np.float64))[:, :, None]
    ends = np.isin(in_groups(q.codes, group), (0, 15))
    assert np.all(error[~ends] <= np.broadcast_to(step * 0.5001, error.shape)[~ends])
    # Code 15 stands for 7 of the 8 steps the opposite sign may need.
    assert np.all(error <= step * (1 + 8 * HALF_STEP))


@given(weights_and_group())
def test_asymmetric_error_is_half_a_step(case: tuple[Floats, int]) -> None:
    weight, group = case
    q = quantize_int4(weight, group, symmetric=False)
    error = np.abs(in_groups(q.dequantize(), group).astype(np.float64) - in_groups(weight, group))
    step = q.scales.astype(np.float64)[:, :, None]
    assert np.all(q.scales > 0)
    assert np.all(error <= step * (0.5001 + 15.5 * HALF_STEP))


@given(weights_and_group())
def test_the_weight_of_largest_magnitude_gets_code_zero(case: tuple[Floats, int]) -> None:
    weight, group = case
    q = quantize_int4(weight, group, symmetric=True)
    grouped = in_groups(weight, group)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    peak = np.where(high > -low, high, low)
    normal = np.abs(peak) / 8 >= 2.0**-14
    at_peak = np.take_along_axis(
        in_groups(q.codes, group), np.argmax(grouped == peak[:, :, None], axis=2)[:, :, None], axis=2
    )[:, :, 0]
    assert np.all(at_peak[normal] == 0)
    assert np.all(np.sign(q.scales[peak != 0]) == -np.sign(peak[peak != 0]))


@given(weights_and_group(), st.booleans())
def test_codes_are_nearest_for_the_stored_scale(case: tuple[Floats, int], symmetric: bool) -> None:
    weight, group = case
    q = quantize_int4(weight, group, symmetric)
    zeros = np.full(q.scales.shape, 8) if q.zeros is None else q.zeros
    levels = (np.arange(16)[None, None] - zeros[:, :, None]) * q.scales[:, :, None].astype(np.float64)
    best = np.abs(in_groups(weight, group)[:, :, :, None] - levels[:, :, None, :]).min(axis=3)
    error = np.abs(in_groups(q.dequantize(), group).astype(np.float64) - in_groups(weight, group))
    assert np.all(error <= best + np.abs(q.scales)[:, :, None] * 1e-5)


@given(weights_and_group(), st.booleans())
def test_scales_are_float16_and_never_zero(case: tuple[Floats, int], symmetric: bool) -> None:
    weight, group = case
    q = quantize_int4(weight, group, symmetric)
    assert np.array_equal(q.scales.astype(np.float16).astype(np.float32), q.scales)
    assert np.all(q.scales != 0)
    assert q.codes.max() <= 15
    assert q.zeros is None or q.zeros.max() <= 15
    empty = ~in_groups(weight, group).any(axis=2)
    assert not in_groups(q.dequantize(), group)[empty].any()


@given(weights_and_group(), st.booleans(), st.integers(1, 4))
def test_row_blocks_equal_the_whole(case: tuple[Floats, int], symmetric: bool, rows: int) -> None:
    weight, group = case
    whole = quantize_int4(weight, group, symmetric)
    parts = [quantize_int4(weight[i : i + rows], group, symmetric) for i in range(0, len(weight), rows)]
    assert np.array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
    assert np.array_equal(np.concatenate([part.scales for part in parts]), whole.scales)
    if whole.zeros is not None:
        zeros = [part.zeros for part in parts if part.zeros is not None]
        assert np.array_equal(np.concatenate(zeros), whole.zeros)


@given(weights(cols=64), st.booleans())
def test_a_strided_view_equals_its_copy(weight: Floats, symmetric: bool) -> None:
    view = np.asfortranarray(np.repeat(weight, 2, axis=1))[:, ::2]
    q, expected = quantize_int4(view, 32, symmetric), quantize_int4(weight, 32, symmetric)
    assert np.array_equal(q.codes, expected.codes)
    assert np.array_equal(q.scales, expected.scales)


def test_hand_computed_symmetric_group() -> None:
    weight = np.array([[4.0, -4.0, 1.0, 0.5, -0.25, 0.0], [-8, 8, 3.5, 2.5, -1, 0]], np.float32)
    q = quantize_int4(weight, 6, symmetric=True)
    assert q.scales.tolist() == [[0.5], [1.0]]
    assert (q.codes.astype(int) - 8).tolist() == [[7, -8, 2, 1, 0, 0], [-8, 7, 4, 2, -1, 0]]
    positive = quantize_int4(np.array([[4.0, -2.0]], np.float32), 2, symmetric=True)
    assert positive.scales.tolist() == [[-0.5]]
    assert positive.codes.tolist() == [[0, 12]]
    assert positive.dequantize().tolist() == [[4.0, -2.0]]


def test_hand_computed_asymmetric_groups() -> None:
    weight = np.array([[-1.0, 0.0, 6.5, 2.0], [3.0, 4.5, 7.5, 6.0]], np.float32)
    q = quantize_int4(weight, 4, symmetric=False)
    assert q.scales.tolist() == [[0.5], [0.5]]
    assert q.zeros is not None
    assert q.zeros.tolist() == [[2], [0]]
    assert q.codes.tolist() == [[0, 2, 15, 6], [6, 9, 15, 12]]
    assert np.array_equal(q.dequantize(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_float16_would_round_to_zero_keep_their_sign_and_size(symmetric: bool) -> None:
    weight = np.full((2, 32), 2.0**-24, np.float32)  # an eighth and a fifteenth of it are 0 in float16
    weight[1] *= -1
    q = quantize_int4(weight, 32, symmetric)
    assert np.array_equal(np.abs(q.scales), np.full((2, 1), 2.0**-24, np.float32))
    assert np.array_equal(q.dequantize(), weight)


def test_a_subnormal_scale_does_not_cut_off_the_outermost_weight() -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, 0] = -8 * 1.4 * 2.0**-24  # nearest would store 2**-24 and reach only 8 * 2**-24
    q = quantize_int4(weight, 32, symmetric=True)
    assert q.scales[0, 0] == 2.0**-23
    assert abs(q.dequantize()[0, 0] - weight[0, 0]) <= 2.0**-24


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_beyond_float16_is_refused_with_its_row(symmetric: bool) -> None:
    weight = np.ones((4, 64), np.float32)
    weight[2, 40] = np.finfo(np.float32).max
    weight[2, 41] = np.finfo(np.float32).min
    with pytest.raises(QuantError, match=r"row 2 needs a scale of .* beyond float16") as caught:
        quantize_int4(weight, 32, symmetric)
    assert caught.value.row == 2
    assert caught.value.hint


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused_with_their_row(value: float, symmetric: bool) -> None:
    weight = np.ones((5, 64), np.float32)
    weight[3, 50] = value
    with pytest.raises(QuantError, match="row 3 holds NaN or infinity") as caught:
        quantize_int4(weight, 32, symmetric)
    assert caught.value.row == 3


def test_wrong_input_is_named() -> None:
    with pytest.raises(QuantError, match="float64"):
        quantize_int4(np.ones((2, 32)), 32, symmetric=True)  # type: ignore[arg-type]
    with pytest.raises(QuantError, match=r"\(32,\)"):
        quantize_int4(np.ones(32, np.float32), 32, symmetric=True)
    with pytest.raises(QuantError, match="48 columns cannot be split into groups of 32"):
        quantize_int4(np.ones((2, 48), np.float32), 32, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_memory_stays_within_four_blocks(symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 2048)).astype(np.float32)
    tracemalloc.start()
    try:
        packed = pack_int4(quantize_int4(weight, 32, symmetric).codes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert packed.shape == (256, 1024)
    assert peak <= 4 * weight.nbytes


codes = st.tuples(st.integers(0, 9), st.integers(0, 70)).flatmap(
    lambda shape: hnp.arrays(np.uint8, shape, elements=st.integers(0, 15))
)


@given(codes)
def test_packing_is_reversible_and_low_nibble_first(values: np.ndarray) -> None:
    values = values[:, : values.shape[1] // 2 * 2]
    packed = pack_int4(values)
    assert packed.shape == (values.shape[0], values.shape[1] // 2)
    assert np.array_equal(packed & 15, values[:, 0::2])
    assert np.array_equal(packed >> 4, values[:, 1::2])
    assert np.array_equal(unpack_int4(packed, values.shape[1]), values)


@given(codes)
def test_packed_zeros_start_a_byte_on_every_row(zeros: np.ndarray) -> None:
    packed = pack_zeros_int4(zeros)
    assert packed.shape == (zeros.shape[0], (zeros.shape[1] + 1) // 2)
    assert np.array_equal(unpack_int4(packed, zeros.shape[1]), zeros)
    if zeros.shape[1] % 2:
        assert not (packed[:, -1] >> 4).any()


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(QuantError, match="even count, got 3"):
        pack_int4(np.zeros((1, 3), np.uint8))
    with pytest.raises(QuantError, match=r"0\.\.15, got 16"):
        pack_int4(np.full((1, 2), 16, np.uint8))
    with pytest.raises(QuantError, match="int8"):
        pack_int4(np.zeros((1, 2), np.int8))
    with pytest.raises(QuantError, match=r"\(rows, 3\) for 5 columns"):
        unpack_int4(np.zeros((1, 2), np.uint8), 5)
