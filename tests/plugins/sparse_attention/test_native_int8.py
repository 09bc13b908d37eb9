"""What int8 caches do that float16 caches do not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from cpm_edge.plugins.sparse_attention import native
from cpm_edge.plugins.sparse_attention.cache import AttentionCache
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import SIZE, Array, make_rows, small_spec
from tests.plugins.sparse_attention.native_cases import heads_of

ISAS = [isa for isa in available_isas() if isa in (Isa.SCALAR, Isa.AVX2)]


def appended(isa: Isa, keys: Array, values: Array, heads: int) -> AttentionCache:
    """The cache after rows (T, heads * D) went through the kernel."""
    size = keys.shape[1] // heads
    spec = SparseAttentionSpec.dense(heads, heads, 1.0)
    cache = AttentionCache.empty(spec, 1, len(keys), size, "int8")
    with ThreadPool(2) as pool:
        query = np.zeros((1, *keys.shape), np.float32)
        native.sparse_attention(pool, spec, query, keys[None], values[None], cache, np.array([0]), isa=isa)
    return cache


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("size", [8, 24, 64, 136, 256])
def test_stored_bits_are_numpys(isa: Isa, size: int) -> None:
    """Over every magnitude: zeros, scales below float16's normal numbers and above its largest, and ties."""
    rng = np.random.default_rng(size)
    exponents = rng.integers(-30, 25, (400, 2 * size)) * (rng.random((400, 1)) < 0.5)
    rows = (rng.standard_normal((400, 2 * size)) * 2.0**exponents).astype(np.float32)
    rows[:100] = rng.integers(-254, 255, (100, 2 * size)) / 2
    rows[:100, ::8] = 127
    rows[100:104] = 0
    rows[104, 3], rows[105, 5], rows[106, 7] = np.nan, np.inf, -np.inf
    spec = SparseAttentionSpec.dense(2, 2, 1.0)
    expected = AttentionCache.empty(spec, 1, 400, size, "int8")
    heads = heads_of(rows, size)[None]
    with np.errstate(over="ignore"):
        expected.write(0, heads, -heads, spec.kernel_size)
    got = appended(isa, rows, -rows, 2)
    for name in ("key", "value", "key_scales", "value_scales"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_row_that_is_not_a_number_stays_visible(isa: Isa, name: str) -> None:
    spec = small_spec(dense_len=1000)
    rows = make_rows(spec, 80)
    bad = dataclasses.replace(rows, **{name: getattr(rows, name).copy()})
    getattr(bad, name)[0, 60, 3] = np.nan
    results = []
    with ThreadPool(2) as pool:
        for each in (rows, bad):
            cache = AttentionCache.empty(spec, 1, 80, SIZE, "int8")
            outputs = []
            for start, stop in ((0, 60), (60, 61), (61, 80)):
                past = np.array([start])
                query, key, value = map(np.ascontiguousarray, each.cut(start, stop))
                outputs.append(native.sparse_attention(pool, spec, query, key, value, cache, past, isa=isa))
            results.append(np.concatenate(outputs, 1)[0].reshape(80, 2, -1))
    expected, got = results
    np.testing.assert_array_equal(got[:60], expected[:60])
    # The head of the bad row from there on, and no other.
    assert np.isnan(got[60:, 0]).any(-1).all()
    np.testing.assert_array_equal(got[:, 1], expected[:, 1])


def test_refusals() -> None:
    spec = small_spec()
    rows = make_rows(spec, 5)
    inputs = (rows.query, rows.key, rows.value)
    cache = AttentionCache.empty(spec, 1, 32, SIZE, "int8")
    with ThreadPool(1) as pool:
        without_one = (
            dataclasses.replace(cache, key_scales=None),
            dataclasses.replace(cache, value_scales=None),
        )
        for lacking in without_one:
            with pytest.raises(NativeError, match="an int8 cache needs them"):
                native.sparse_attention(pool, spec, *inputs, lacking, np.array([0]))
        with pytest.raises(NativeError, match=r"key scales: expected \(1, 2, 32, 1\)"):
            wrong = dataclasses.replace(cache, key_scales=np.zeros((1, 2, 32, 2), np.float16))
            native.sparse_attention(pool, spec, *inputs, wrong, np.array([0]))
        scaled = AttentionCache.empty(spec, 1, 32, SIZE)
        with pytest.raises(NativeError, match="do not take this shape"):
            odd = dataclasses.replace(scaled, key_scales=cache.key_scales, value_scales=cache.value_scales)
            native.sparse_attention(pool, spec, *inputs, odd, np.array([0]))
        assert not cache.key.any()
