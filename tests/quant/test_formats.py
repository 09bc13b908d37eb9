from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import (
    GROUP_SIZES,
    QuantError,
    Quantized,
    Scheme,
    WeightFormat,
    fit_group,
    pack_int4,
    pack_zeros_int4,
    quantize,
)

from .strategies import Floats, weights

INT_SCHEMES = [
    Scheme(WeightFormat.INT4, 32),
    Scheme(WeightFormat.INT4, 32, symmetric=False),
    Scheme(WeightFormat.INT8),
    Scheme(WeightFormat.INT8, 32),
]


@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=Scheme.describe)
@given(weight=weights(cols=96))
def test_bytes_for_counts_what_packing_makes(scheme: Scheme, weight: Floats) -> None:
    q = quantize(weight, scheme)
    codes = pack_int4(q.codes) if scheme.bits == 4 else q.codes
    zeros = 0 if q.zeros is None else pack_zeros_int4(q.zeros).nbytes
    packed = codes.nbytes + q.scales.astype(np.float16).nbytes + zeros
    assert scheme.bytes_for(*weight.shape) == packed


def test_bytes_for_floats_and_uneven_columns() -> None:
    assert Scheme(WeightFormat.FP32).bytes_for(3, 5) == 60
    assert Scheme(WeightFormat.BF16).bytes_for(3, 5) == 30
    assert Scheme(WeightFormat.INT8).bytes_for(3, 5) == 21
    with pytest.raises(QuantError, match="multiple of 2 columns, got 5"):
        Scheme(WeightFormat.INT4).bytes_for(3, 5)
    with pytest.raises(QuantError, match="48 columns cannot be split into groups of 32"):
        Scheme(WeightFormat.INT4, 32).bytes_for(3, 48)


def test_descriptions_and_bits() -> None:
    assert [scheme.describe() for scheme in INT_SCHEMES] == [
        "int4 g32 sym",
        "int4 g32 asym",
        "int8 row sym",
        "int8 g32 sym",
    ]
    assert Scheme(WeightFormat.FP16).describe() == "fp16"
    assert [format_.bits for format_ in WeightFormat] == [32, 16, 16, 8, 4, 2]
    assert WeightFormat("int4") is WeightFormat.INT4


def test_schemes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(QuantError, match="got 0"):
        Scheme(WeightFormat.INT4, 0)
    with pytest.raises(QuantError, match="bf16 has no scales"):
        Scheme(WeightFormat.BF16, 32)
    with pytest.raises(QuantError, match="asymmetric int8"):
        Scheme(WeightFormat.INT8, symmetric=False)
    with pytest.raises(QuantError, match="not an integer format"):
        quantize(np.ones((1, 32), np.float32), Scheme(WeightFormat.FP16))


@given(st.integers(1, 20000), st.sampled_from(GROUP_SIZES))
def test_fit_group_is_the_largest_divisor_up_to_the_request(cols: int, requested: int) -> None:
    fitting = [size for size in GROUP_SIZES if size <= requested and cols % size == 0]
    if fitting:
        assert fit_group(cols, requested) == max(fitting)
    else:
        with pytest.raises(QuantError, match=f"^{cols} columns"):
            fit_group(cols, requested)


def test_fit_group_refuses_sizes_that_are_not_offered() -> None:
    with pytest.raises(QuantError, match="expected one of 32, 64, 128, got 16"):
        fit_group(64, 16)
    with pytest.raises(QuantError, match="0 columns"):
        fit_group(0, 32)


def test_quantized_refuses_arrays_that_do_not_fit() -> None:
    codes, scales = np.zeros((2, 64), np.uint8), np.ones((2, 2), np.float32)
    zeros = np.zeros((2, 2), np.uint8)
    scheme = Scheme(WeightFormat.INT4, 32)
    assert Quantized(codes, scales, None, scheme).dequantize().tolist() == [[-8.0] * 64] * 2
    with pytest.raises(QuantError, match="zero points: int4 g32 sym was given some"):
        Quantized(codes, scales, zeros, scheme)
    with pytest.raises(QuantError, match="zero points: int4 g32 asym was given none"):
        Quantized(codes, scales, None, Scheme(WeightFormat.INT4, 32, symmetric=False))
    with pytest.raises(QuantError, match=r"scales: expected float32 \(2, 2\), got float32 \(2, 1\)"):
        Quantized(codes, scales[:, :1], None, scheme)
    with pytest.raises(QuantError, match="codes: expected uint8"):
        Quantized(codes.astype(np.int8), scales, None, scheme)


def test_a_per_row_int4_scheme_takes_the_row_as_its_group() -> None:
    q = quantize(np.arange(-8, 4, dtype=np.float32).reshape(1, 12), Scheme(WeightFormat.INT4))
    assert q.scheme.group_size == 12
    assert np.array_equal(q.dequantize(), np.arange(-8, 4, dtype=np.float32).reshape(1, 12))
