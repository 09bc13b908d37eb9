from __future__ import annotations

import numpy as np

from cpm_edge.benchmarks.context.attention import AttentionProbe
from cpm_edge.benchmarks.context.synthetic import Synthetic
from cpm_edge.plugins.native import ThreadPool
from cpm_edge.plugins.sparse_attention.native import AttentionCache, AttentionCall, sparse_attention
from cpm_edge.plugins.sparse_attention.pooling import pool_keys
from cpm_edge.plugins.sparse_attention.reference import pooled_keys
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

SPEC = SparseAttentionSpec(4, 2, 0.25, 8, 4, 16, 1, 32, 3, 64)


def test_layers_differ_and_parts_fit_together() -> None:
    synthetic = Synthetic(2, 1000, 8)
    keys, values = synthetic.rows(1, 0, 1000)
    assert keys.shape == values.shape == (2, 1000, 8) and keys.dtype == np.float16
    assert 0.9 < keys.astype(np.float32).std() < 1.1
    np.testing.assert_array_equal(synthetic.rows(1, 30, 50)[0], keys[:, 30:50])
    assert not np.array_equal(synthetic.rows(2, 0, 1000)[0], keys)
    assert not np.array_equal(keys, values)


def test_pooled_keys_are_those_of_the_reference() -> None:
    keys = Synthetic(2, 96, 16).rows(0, 0, 96)[0]
    pooled = np.full((2, 24, 16), np.nan, np.float32)
    for first, stop in ((0, 3), (3, 8), (8, 50), (50, 51), (51, 93)):
        pool_keys(keys, pooled, 8, first, stop)
    for head in range(2):
        expected = pooled_keys(keys[head].astype(np.float32), 8, 4)
        windows = (93 - 8) // 4 + 1
        np.testing.assert_allclose(pooled[head, :windows], expected[:windows], atol=1e-6)
    assert np.isnan(pooled[:, windows:]).all(), "incomplete windows are left alone"


def test_the_probe_runs_both_kernels_at_any_position() -> None:
    probe = AttentionProbe(SPEC, 16, 2, 200, 1, Synthetic(2, 200, 16))
    for dense in (False, True):
        assert probe.decode(150, dense=dense) > 0
        assert probe.prefill(0, 150, 64, dense=dense) > 0
    probe.close()


def test_a_prepared_call_may_run_again() -> None:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 70, 64), np.float32)
    key, value = rng.standard_normal((2, 1, 70, 32), np.float32)
    with ThreadPool(2) as pool:
        expected = sparse_attention(
            pool, SPEC, query, key, value, AttentionCache.empty(SPEC, 1, 80, 16), np.array([0])
        )
        call = AttentionCall(
            pool, SPEC, query, key, value, AttentionCache.empty(SPEC, 1, 80, 16), np.array([0])
        )
        for _ in range(2):
            call.output[:] = np.nan
            call()
            np.testing.assert_array_equal(call.output, expected)
