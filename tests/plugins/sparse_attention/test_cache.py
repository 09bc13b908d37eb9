from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.sparse_attention.cache import (
    KEY_GROUP,
    MAX_CODE,
    AttentionCache,
    dequantize,
    quantize,
)
from cpm_edge.plugins.sparse_attention.reference import pooled_keys
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import SIZE, small_spec

# Magnitudes whose scales are normal float16 numbers.
FLOATS = st.floats(-(2.0**20), 2.0**20, width=32).filter(lambda x: x == 0 or abs(x) >= 2.0**-6)


@given(npst.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 80)), elements=FLOATS))
def test_codes_are_the_nearest_multiples_of_the_scale(rows: np.ndarray) -> None:
    codes, scales = quantize(rows, KEY_GROUP)
    assert codes.shape == rows.shape and scales.shape == (len(rows), -(-rows.shape[1] // KEY_GROUP))
    assert np.abs(codes.astype(np.int32)).max() <= MAX_CODE
    step = np.repeat(scales.astype(np.float64), KEY_GROUP, -1)[:, : rows.shape[1]]
    # Half a step, and a little where the scale was rounded down: 127.06 has code 127.
    assert (np.abs(dequantize(codes, scales, KEY_GROUP) - rows) <= step * 0.57).all()


@given(npst.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 70)), elements=FLOATS))
def test_what_was_rounded_is_rounded_to_itself(rows: np.ndarray) -> None:
    once = dequantize(*quantize(rows, KEY_GROUP), KEY_GROUP)
    np.testing.assert_array_equal(dequantize(*quantize(once, KEY_GROUP), KEY_GROUP), once)


def test_what_is_not_finite_stays_visible_in_its_group() -> None:
    rows = np.ones((4, 64), np.float32)
    rows[0, 3], rows[1, 40], rows[2, 0], rows[3] = np.nan, np.inf, -np.inf, 0
    restored = dequantize(*quantize(rows, KEY_GROUP), KEY_GROUP)
    hidden = np.isnan(restored).reshape(4, 2, KEY_GROUP)
    assert hidden.all(-1).tolist() == hidden.any(-1).tolist()
    assert hidden.all(-1).tolist() == [[True, False], [False, True], [True, False], [False, False]]
    assert not restored[3].any()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("parts", [(90,), (1, 6, 1, 40, 42)])
def test_written_rows_and_the_pooled_keys_they_complete(dtype: str, parts: tuple[int, ...]) -> None:
    spec = small_spec()
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 2, 2, 90, SIZE)).astype(np.float32)
    cache, first = AttentionCache.empty(spec, 2, 96, SIZE, dtype), 0
    for count in parts:
        rows = slice(first, first + count)
        cache.write(first, keys[:, :, rows], values[:, :, rows], spec.kernel_size)
        first += count
    assert cache.pooled is not None
    stored = cache.keys(0, 90)
    np.testing.assert_allclose(stored, keys, atol=0.02)
    np.testing.assert_allclose(cache.values(0, 90), values, atol=0.02)
    for b in range(2):
        for h in range(2):
            expected = pooled_keys(stored[b, h], spec.kernel_size, spec.kernel_stride)
            np.testing.assert_allclose(cache.pooled[b, h, : len(expected)], expected, atol=1e-6)
            assert not cache.pooled[b, h, len(expected) :].any()
    larger = cache.resized(spec, 128)
    assert (larger.capacity, larger.key.dtype) == (128, cache.key.dtype)
    np.testing.assert_array_equal(larger.keys(0, 90), stored)
    np.testing.assert_array_equal(larger.values(0, 90), cache.values(0, 90))
    assert not larger.keys(96, 128).any()


@pytest.mark.parametrize(("size", "ratio"), [(64, 0.523), (128, 0.520), (40, 0.538)])
def test_int8_takes_about_half_the_bytes(size: int, ratio: float) -> None:
    spec = small_spec().dense(4, 2, 1.0)
    half, int8 = (AttentionCache.empty(spec, 1, 64, size, dtype).nbytes for dtype in ("float16", "int8"))
    assert int8 / half == pytest.approx(ratio, abs=2e-3)


def test_a_latent_cache_has_keys_alone() -> None:
    spec = SparseAttentionSpec.latent(4, 0.25, 48)
    rows = np.random.default_rng(0).standard_normal((1, 1, 30, 56), np.float32)
    cache = AttentionCache.empty(spec, 1, 64, 56)
    assert cache.value is None and cache.nbytes == 64 * 56 * 2
    cache.write(5, rows, None, spec.kernel_size)
    grown = cache.resized(spec, 128)
    np.testing.assert_array_equal(grown.keys(5, 35), rows.astype(np.float16))
    assert not grown.c_struct(0).value
    with pytest.raises(ValueError, match="a latent cache has no values beside its keys"):
        grown.values(0, 5)
    with pytest.raises(ValueError, match="cache type: expected float16, got int8"):
        AttentionCache.empty(spec, 1, 64, 56, "int8")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="cache type: expected float16 or int8, got float32"):
        AttentionCache.empty(small_spec(), 1, 32, SIZE, "float32")
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        AttentionCache.empty(small_spec(), 1, 40, SIZE)
    rows: Any = np.zeros((1, 2, 32, SIZE))
    with pytest.raises(NativeError, match="expected float16 or int8, got float64"):
        AttentionCache(rows, rows, None).c_struct(0)
