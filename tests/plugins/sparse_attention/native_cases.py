"""Calls of the native kernels on filled caches, and what the reference says about them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cpm_edge.plugins.native import Isa, ThreadPool
from cpm_edge.plugins.sparse_attention import native, reference
from cpm_edge.plugins.sparse_attention.cache import AttentionCache
from cpm_edge.plugins.sparse_attention.reference import Trace, pooled_keys
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import (
    CHUNKS,
    NEAR_TIE,
    Array,
    Rows,
    in_float64,
    make_rows,
    rounded,
    small_spec,
)

# A score is one chain of up to 256 products, and a case may have too few rows to show what float32 loses.
LEAST_TOLERANCE = 4e-6


@dataclass(frozen=True)
class Case:
    """Rows after a filled cache, and the reference's answers on the keys and values as they are stored.

    Attributes:
        dtype: of the cache.
        past, rows: those in the cache before the call, and the new ones; neither is rounded.
        output: (1, T, Hq * D), the formula in float64.
        tolerance: twice what the formula loses in float32, and at least 4e-6.
        compared: (T,), false where a selection hangs on a gap above 0 and below 1e-6.
        trace: of the float32 reference.
    """

    spec: SparseAttentionSpec
    size: int
    dtype: str
    past: Rows
    rows: Rows
    output: Array
    tolerance: float
    compared: Array
    trace: Trace

    @property
    def total(self) -> int:
        return self.past.count + self.rows.count

    def cache(self) -> AttentionCache:
        """The past in place, everything beyond it poisoned."""
        cache = AttentionCache.empty(self.spec, 1, rounded(self.total, self.spec), self.size, self.dtype)
        poison(cache)
        fill(cache, self.spec, self.past, self.size)
        return cache

    def run(self, pool: ThreadPool, isa: Isa, chunks: tuple[int, ...] = ()) -> tuple[Array, Array]:
        """Output (1, T, Hq * D) and selected blocks (1, T, Hkv, budget), after checking the cache."""
        cache, start = self.cache(), 0
        outputs, selections = [], []
        for count in chunks or (self.rows.count,):
            out = np.full((1, count, self.output.shape[2]), np.nan, np.float32)
            chosen = np.full((1, count, self.spec.kv_num_heads, self.spec.budget), -7, np.int32)
            query, key, value = map(np.ascontiguousarray, self.rows.cut(start, start + count))
            past = np.array([self.past.count + start], np.int64)
            native.sparse_attention(
                pool, self.spec, query, key, value, cache, past, isa=isa, out=out, selected=chosen
            )
            outputs.append(out)
            selections.append(chosen)
            start += count
        self.check_cache(cache)
        return np.concatenate(outputs, 1), np.concatenate(selections, 1)

    def check_cache(self, cache: AttentionCache) -> None:
        """Every row as numpy stores it, bit by bit, and the poison behind them untouched."""
        expected = AttentionCache.empty(self.spec, 1, cache.capacity, self.size, self.dtype)
        poison(expected)
        every = Rows(
            *(np.concatenate(pair, 1) for pair in zip(self.past.all(), self.rows.all(), strict=True))
        )
        fill(expected, self.spec, every, self.size)
        for name in ("key", "value", "key_scales", "value_scales"):
            np.testing.assert_array_equal(getattr(cache, name), getattr(expected, name))
        if cache.pooled is not None and expected.pooled is not None:
            np.testing.assert_allclose(cache.pooled, expected.pooled, rtol=0, atol=3e-7)

    def check(self, output: Array, selected: Array) -> None:
        error = np.abs(output - self.output).max(-1)[0][self.compared]
        assert error.max() <= self.tolerance, f"{error.max():.2e} > {self.tolerance:.2e}"
        assert self.compared.mean() > 0.9
        sparse = np.zeros(self.rows.count, bool)
        for (_, head, position), blocks in self.trace.selected.items():
            row = position - self.past.count
            sparse[row] = True
            if self.compared[row]:
                chosen = selected[0, row, head]
                assert chosen[chosen >= 0].tolist() == blocks.tolist()
                assert (chosen[len(blocks) :] == -1).all()
        assert self.spec.is_dense or (selected[0, ~sparse] == -1).all()


def poison(cache: AttentionCache) -> None:
    """Whatever reads a row that was not written gets NaN."""
    for array in (cache.key, cache.value, cache.pooled, cache.key_scales, cache.value_scales):
        if array is not None:
            array[...] = 99 if array.dtype == np.int8 else np.nan


def fill(cache: AttentionCache, spec: SparseAttentionSpec, rows: Rows, size: int) -> None:
    """The rows of one sequence from 0 on, with the reference's pooled keys."""
    key, value = (heads_of(array[0], size)[None] for array in (rows.key, rows.value))
    cache.write(0, key, value, spec.kernel_size)
    if cache.pooled is not None:
        for stored, pooled in zip(cache.keys(0, rows.count)[0], cache.pooled[0], strict=True):
            known = pooled_keys(stored, spec.kernel_size, spec.kernel_stride)
            pooled[: len(known)] = known


def heads_of(rows: Array, size: int) -> Array:
    """(T, H * D) as (H, T, D)."""
    split: Array = rows.reshape(len(rows), rows.shape[1] // size, size)
    return split.swapaxes(0, 1)


def make_case(
    spec: SparseAttentionSpec,
    count: int,
    past: int,
    size: int,
    *,
    dtype: str = "float16",
    all_rows: Rows | None = None,
) -> Case:
    """``count`` rows after ``past`` ones."""
    made = make_rows(spec, past + count, size=size, seed=past + count) if all_rows is None else all_rows
    before, rows = Rows(*made.cut(0, past)), Rows(*made.cut(past, past + count))
    cache = AttentionCache.empty(spec, 1, rounded(past + count, spec), size, dtype)
    key, value = (heads_of(array[0], size)[None] for array in (made.key, made.value))
    cache.write(0, key, value, spec.kernel_size)
    keys, values = cache.keys(0, cache.capacity), cache.values(0, cache.capacity)
    # The new rows as they are stored, in the form that the op takes them.
    stop = past + count
    new_key, new_value = (
        array[:, :, past:stop].swapaxes(1, 2).reshape(1, count, -1).copy() for array in (keys, values)
    )
    keys[:, :, past:], values[:, :, past:] = np.nan, np.nan
    inputs = (rows.query, new_key, new_value, keys, values)
    length, trace = np.array([past]), Trace()
    single, *_ = reference.sparse_attention(*inputs, length, spec=spec, trace=trace)
    double, *_ = in_float64(*(array.astype(np.float64) for array in inputs), length, spec=spec)
    compared = np.ones(count, bool)
    for (_, _, position), gap in trace.gaps.items():
        if 0 < gap < NEAR_TIE:
            compared[position - past] = False
    error = np.abs(single - double).max(-1)[0][compared].max()
    tolerance = max(2 * float(error), LEAST_TOLERANCE)
    return Case(spec, size, dtype, before, rows, double, tolerance, compared, trace)


@cache
def case_from_nothing(heads: int, kv_heads: int, size: int, coarse_lse: int, dtype: str = "float16") -> Case:
    """Dense rows, then sparse ones, made once for every instruction set and cut."""
    spec = small_spec(heads, kv_heads, size, coarse_lse=coarse_lse)
    return make_case(spec, sum(CHUNKS), 0, size, dtype=dtype)


def published_spec(heads: int, kv_heads: int, size: int, **changes: Any) -> SparseAttentionSpec:
    """Published pooling sizes, with a budget of 7 blocks and sparse from 512 tokens on."""
    fields: dict[str, Any] = {"window_size": 256, "topk": 3, "dense_len": 512}
    return SparseAttentionSpec(heads, kv_heads, size**-0.5, **(fields | changes))
