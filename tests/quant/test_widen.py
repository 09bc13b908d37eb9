from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import QuantError, Quantized, Scheme, WeightFormat
from cpm_edge.quant.widen import widen

SCHEMES = {
    2: Scheme(WeightFormat.TERNARY, 32),
    4: Scheme(WeightFormat.INT4, 32),
    8: Scheme(WeightFormat.INT8, 32),
}


def matrix(bits: int, symmetric: bool, seed: int) -> Quantized:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3 if bits == 2 else 1 << bits, (5, 96)).astype(np.uint8)
    zeros = None if symmetric else rng.integers(0, 16, (5, 3)).astype(np.uint8)
    scales = rng.standard_normal((5, 3)).astype(np.float16).astype(np.float32)
    return Quantized(codes, scales, zeros, replace(SCHEMES[bits], symmetric=symmetric))


@given(
    st.sampled_from([(2, True), (4, True), (4, False), (8, True)]),
    st.sampled_from([(2, True), (4, True), (4, False), (8, True)]),
    st.integers(0, 2**32 - 1),
)
def test_no_weight_changes(own: tuple[int, bool], wanted: tuple[int, bool], seed: int) -> None:
    q = matrix(*own, seed)
    if wanted[0] < own[0] or (own, wanted) == ((4, False), (4, True)):
        with pytest.raises(QuantError, match="does not fit into"):
            widen(q, *wanted)
        return
    codes, zeros = widen(q, *wanted)
    scheme = replace(SCHEMES[wanted[0]], symmetric=wanted[1])
    np.testing.assert_array_equal(Quantized(codes, q.scales, zeros, scheme).dequantize(), q.dequantize())
