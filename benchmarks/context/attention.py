"""The attention kernel alone, at a model's shape, called directly."""

from __future__ import annotations

import time

import numpy as np

from cpm_edge.benchmarks.context.synthetic import Synthetic
from cpm_edge.plugins.native import ThreadPool
from cpm_edge.plugins.sparse_attention.native import AttentionCache, AttentionCall
from cpm_edge.plugins.sparse_attention.pooling import pool_keys
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

ROUNDS = 3


class AttentionProbe:
    """Filled caches of every layer, so that a step finds them in memory as the model's steps do.

    Args:
        spec: the sparse one; the dense kernel runs on the same caches.
        capacity: rows of the caches; filled to their end.
        threads: of its own pool.
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        head_size: int,
        layers: int,
        capacity: int,
        threads: int,
        synthetic: Synthetic,
    ) -> None:
        self.sparse = spec
        self.dense = SparseAttentionSpec.dense(spec.num_heads, spec.kv_num_heads, spec.scale)
        self.head_size = head_size
        self._pool = ThreadPool(threads)
        capacity = -(-capacity // spec.block_size) * spec.block_size
        self._caches = [self._filled(layer, capacity, synthetic) for layer in range(layers)]

    def decode(self, position: int, *, dense: bool) -> float:
        """Seconds that all layers take for one token with ``position`` rows before it."""
        calls = [self._call(cache, position, 1, dense) for cache in self._caches]
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def prefill(self, first: int, stop: int, chunk: int, *, dense: bool) -> float:
        """Seconds that all layers take for rows [first, stop): those of one layer times their number."""
        calls = [
            self._call(self._caches[0], start, min(chunk, stop - start), dense)
            for start in range(first, stop, chunk)
        ]
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) * len(self._caches)

    def close(self) -> None:
        self._caches.clear()
        self._pool.close()

    def _filled(self, layer: int, capacity: int, synthetic: Synthetic) -> AttentionCache:
        cache = AttentionCache.empty(self.sparse, 1, capacity, self.head_size)
        assert cache.value is not None
        cache.key[0], cache.value[0] = synthetic.rows(layer, 0, capacity)
        if cache.pooled is not None:
            pool_keys(cache.key[0], cache.pooled[0], self.sparse.kernel_size, 0, capacity)
        return cache

    def _call(self, cache: AttentionCache, past: int, rows: int, dense: bool) -> AttentionCall:
        spec = self.dense if dense else self.sparse
        rng = np.random.default_rng(past)
        heads = (spec.num_heads, spec.kv_num_heads, spec.kv_num_heads)
        query, key, value = (
            rng.standard_normal((1, rows, count * self.head_size), np.float32) for count in heads
        )
        return AttentionCall(self._pool, spec, query, key, value, cache, np.array([past]))
