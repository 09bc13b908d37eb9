from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import QuantError, quantize_int8

from .strategies import Floats, weights, weights_and_group


@given(weights_and_group(), st.booleans())
def test_error_is_half_a_step_and_scales_are_float16(case: tuple[Floats, int], per_row: bool) -> None:
    weight, group = case
    q = quantize_int8(weight, None if per_row else group)
    width = weight.shape[1] if per_row else group
    assert q.scales.shape == (weight.shape[0], weight.shape[1] // width)
    assert np.array_equal(q.scales.astype(np.float16).astype(np.float32), q.scales)
    assert np.all(q.scales > 0)
    assert q.codes.min() >= 1
    error = np.abs(q.dequantize().astype(np.float64) - weight)
    assert np.all(error <= np.repeat(q.scales, width, axis=1) * (0.5001 + 127 * 2.0**-11))


@given(weights(), st.integers(1, 4))
def test_row_blocks_equal_the_whole(weight: Floats, rows: int) -> None:
    whole = quantize_int8(weight)
    parts = [quantize_int8(weight[i : i + rows]) for i in range(0, len(weight), rows)]
    assert np.array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
    assert np.array_equal(np.concatenate([part.scales for part in parts]), whole.scales)


@given(weights())
def test_negation_is_exact(weight: Floats) -> None:
    assert np.array_equal(quantize_int8(-weight).dequantize(), -quantize_int8(weight).dequantize())


def test_hand_computed_rows() -> None:
    q = quantize_int8(np.array([[127.0, -127.0, 0.5, 1.5, -2.0], [0, 0, 0, 0, 0]], np.float32))
    assert q.scales[0, 0] == 1.0
    assert q.zeros is None
    assert (q.codes.astype(int) - 128).tolist() == [[127, -127, 0, 2, -2], [0, 0, 0, 0, 0]]
    assert q.scheme.describe() == "int8 row sym"


def test_bad_weights_are_refused_with_their_row() -> None:
    weight = np.ones((3, 10), np.float32)
    weight[1, 9] = np.nan
    with pytest.raises(QuantError, match="row 1 holds NaN"):
        quantize_int8(weight)
    weight[1, 9] = 1e8
    with pytest.raises(QuantError, match="row 1 needs a scale of 787402"):
        quantize_int8(weight)
    with pytest.raises(QuantError, match=r"\(10,\)"):
        quantize_int8(weight[0])
