"""AWQ's scales: what they promise, and channels that several inputs share."""

from __future__ import annotations

import numpy as np
import pytest

from cpm_edge.quant import QuantError, Quantized, quantize_int4
from cpm_edge.quant.awq import Reader, search_scales
from cpm_edge.quant.hessian import output_power
from cpm_edge.quant.scales import Floats
from tests.quant.test_gptq import problem

OUTLIER = 5


def rounded(weight: Floats) -> Quantized:
    return quantize_int4(weight, 32, True)


def with_outlier(seed: int = 1, cols: int = 64) -> Reader:
    """A matrix with one input thirty times as large as the others."""
    weight, moment = problem(40, cols, seed)
    moment[OUTLIER] *= 30
    moment[:, OUTLIER] *= 30
    return Reader(weight, moment)


def test_scales_make_large_inputs_finer_and_the_outputs_better() -> None:
    reader = with_outlier()
    factors = search_scales([reader], np.arange(64), rounded)
    assert factors is not None
    assert factors[OUTLIER] == factors.max() > 1
    scaled = rounded(reader.weight * factors).dequantize() / factors
    before = output_power(reader.weight - rounded(reader.weight).dequantize(), reader.hessian).sum()
    assert output_power(reader.weight - scaled, reader.hessian).sum() < before


def test_inputs_of_one_channel_share_its_factor() -> None:
    reader = with_outlier()
    channels = np.arange(64) // 2 + 3  # 32 channels behind three that make no input
    factors = search_scales([reader], channels, rounded)
    assert factors is not None
    assert factors.shape == (35,)
    np.testing.assert_array_equal(factors[:3], 1)
    assert factors.argmax() == OUTLIER // 2 + 3


def test_no_scales_where_all_inputs_are_alike() -> None:
    weight, _ = problem(20, 64, 4)
    assert search_scales([Reader(weight, np.eye(64, dtype=np.float32))], np.arange(64), rounded) is None


def test_no_scales_without_inputs() -> None:
    weight, moment = problem(20, 64, 4)
    assert search_scales([Reader(weight, np.zeros_like(moment))], np.arange(64), rounded) is None


def test_columns_and_channels_must_agree() -> None:
    with pytest.raises(QuantError, match="expected matrices of 32 columns"):
        search_scales([with_outlier()], np.arange(32), rounded)
