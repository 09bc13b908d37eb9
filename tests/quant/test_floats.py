from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpm_edge.quant import QuantError, check_finite, from_bf16_bits, to_bf16_bits, to_fp16

any_bits = hnp.arrays(
    np.uint32, hnp.array_shapes(max_dims=3, max_side=40), elements=st.integers(0, 2**32 - 1)
)


@given(any_bits)
def test_bf16_equals_ml_dtypes_on_any_bit_pattern(bits: np.ndarray) -> None:
    values = bits.view(np.float32)
    nan = np.isnan(values)
    got = to_bf16_bits(values)
    assert got.shape == values.shape
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(got[~nan], expected[~nan])
    assert np.isnan(from_bf16_bits(got)[nan]).all()


def test_bf16_ties_go_to_even_and_special_values_stay() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert to_bf16_bits(ties).tolist() == [0x3F80, 0x3F82, 0x3F81]
    special = np.array([0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x80000000], np.uint32)
    assert to_bf16_bits(special.view(np.float32)).tolist() == [0x7F80, 0xFF80, 0x7FFF, 0xFFFF, 0x7FC0, 0x8000]
    assert to_bf16_bits(np.array([np.finfo(np.float32).max], np.float32)).tolist() == [0x7F80]


@given(hnp.arrays(np.uint16, st.integers(0, 60), elements=st.integers(0, 2**16 - 1)))
def test_bf16_round_trips(bits: np.ndarray) -> None:
    bits = bits[np.isfinite(from_bf16_bits(bits))]
    assert np.array_equal(to_bf16_bits(from_bf16_bits(bits)), bits)


def test_bf16_refuses_other_types_and_takes_views() -> None:
    with pytest.raises(QuantError, match="float64"):
        to_bf16_bits(np.ones(3))  # type: ignore[arg-type]
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert np.array_equal(to_bf16_bits(values.T[::2]), to_bf16_bits(values).T[::2])
    assert to_bf16_bits(np.ones((), np.float32)).shape == ()


def test_fp16_rounds_and_names_the_row_that_does_not_fit() -> None:
    weight = np.ones((3, 4), np.float32)
    weight[0] = [65519.0, 1e-9, -2.5, 0.1]
    assert to_fp16(weight)[0].tolist() == [65504.0, 0.0, -2.5, float(np.float16(0.1))]
    weight[1, 2] = -65520.0
    with pytest.raises(QuantError, match="row 1 holds 65520"):
        to_fp16(weight)
    weight[1, 2] = np.inf
    with pytest.raises(QuantError, match="row 1 holds NaN or infinity"):
        to_fp16(weight)


def test_check_finite_takes_empty_matrices_and_names_wrong_shapes() -> None:
    check_finite(np.empty((0, 8), np.float32))
    check_finite(np.empty((8, 0), np.float32))
    with pytest.raises(QuantError, match=r"float16 \(2, 2\)"):
        check_finite(np.ones((2, 2), np.float16))
