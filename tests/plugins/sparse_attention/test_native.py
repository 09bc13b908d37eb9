from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from cpm_edge.plugins.sparse_attention import native, reference
from cpm_edge.plugins.sparse_attention.native import AttentionCache
from cpm_edge.plugins.sparse_attention.reference import Trace, pooled_keys
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import (
    CHUNKS,
    NEAR_TIE,
    SIZE,
    Array,
    Rows,
    in_float64,
    make_rows,
    rounded,
    small_spec,
)

# The other vector paths are the AVX2 one.
ISAS = [isa for isa in available_isas() if isa in (Isa.SCALAR, Isa.AVX2)]
# A score is one chain of up to 256 products, and a case may have too few rows to show what float32 loses.
LEAST_TOLERANCE = 4e-6
BY_ISA = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
BY_CHUNKS = pytest.mark.parametrize(
    "chunks", [CHUNKS, (sum(CHUNKS),)], ids=lambda chunks: f"{len(chunks)}chunks"
)


def stored(rows: Array) -> Array:
    """Float32 of what a float16 cache keeps."""
    return rows.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """Rows after a filled cache, and the reference's answers on the keys and values as they are stored.

    Attributes:
        rows: the new rows, not rounded.
        past: rows before them, rounded.
        output: (1, T, Hq * D), the formula in float64.
        tolerance: twice what the formula loses in float32, and at least 4e-6.
        compared: (T,), false where a selection hangs on a gap above 0 and below 1e-6.
        trace: of the float32 reference.
    """

    spec: SparseAttentionSpec
    size: int
    rows: Rows
    past: Rows
    output: Array
    tolerance: float
    compared: Array
    trace: Trace

    def cache(self) -> AttentionCache:
        """The past in place, everything beyond it poisoned with NaN."""
        total = self.past.count + self.rows.count
        cache = AttentionCache.empty(self.spec, 1, rounded(total, self.spec), self.size)
        for buffer, rows in ((cache.key, self.past.key), (cache.value, self.past.value)):
            buffer[:, :, self.past.count :] = np.nan
            buffer[0, :, : self.past.count] = heads_of(rows[0], self.size)
        if cache.pooled is not None:
            cache.pooled[:] = np.nan
            for h in range(self.spec.kv_num_heads):
                known = self.pooled(heads_of(self.past.key[0], self.size)[h])
                cache.pooled[0, h, : len(known)] = known
        return cache

    def pooled(self, keys: Array) -> Array:
        return pooled_keys(keys, self.spec.kernel_size, self.spec.kernel_stride)

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
        total = self.past.count + self.rows.count
        for buffer, name in ((cache.key, "key"), (cache.value, "value")):
            every = np.concatenate([getattr(self.past, name), getattr(self.rows, name)], 1)[0]
            np.testing.assert_array_equal(buffer[0, :, :total], heads_of(every, self.size).astype(np.float16))
            assert np.isnan(buffer[0, :, total:]).all()
        if cache.pooled is not None:
            for h in range(self.spec.kv_num_heads):
                expected = self.pooled(cache.key[0, h, :total].astype(np.float32))
                np.testing.assert_allclose(cache.pooled[0, h, : len(expected)], expected, rtol=0, atol=3e-7)
                assert np.isnan(cache.pooled[0, h, len(expected) :]).all()

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


def heads_of(rows: Array, size: int) -> Array:
    """(T, H * D) as (H, T, D)."""
    split: Array = rows.reshape(len(rows), rows.shape[1] // size, size)
    return split.swapaxes(0, 1)


def make_case(
    spec: SparseAttentionSpec, count: int, past: int, size: int, *, all_rows: Rows | None = None
) -> Case:
    made = make_rows(spec, past + count, size=size, seed=past + count) if all_rows is None else all_rows
    before = Rows(*(stored(array) for array in made.cut(0, past)))
    rows = Rows(*made.cut(past, past + count))
    shape = (1, spec.kv_num_heads, rounded(past + count, spec), size)
    old_keys, old_values = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    old_keys[0, :, :past] = heads_of(before.key[0], size)
    old_values[0, :, :past] = heads_of(before.value[0], size)
    inputs = (rows.query, stored(rows.key), stored(rows.value), old_keys, old_values)
    length, trace = np.array([past]), Trace()
    single, *_ = reference.sparse_attention(*inputs, length, spec=spec, trace=trace)
    double, *_ = in_float64(*(array.astype(np.float64) for array in inputs), length, spec=spec)
    compared = np.ones(count, bool)
    for (_, _, position), gap in trace.gaps.items():
        if 0 < gap < NEAR_TIE:
            compared[position - past] = False
    error = np.abs(single - double).max(-1)[0][compared].max()
    return Case(spec, size, rows, before, double, max(2 * float(error), LEAST_TOLERANCE), compared, trace)


@cache
def case_from_nothing(heads: int, kv_heads: int, size: int, coarse_lse: int) -> Case:
    """Dense rows, then sparse ones, made once for every instruction set and cut."""
    return make_case(small_spec(heads, kv_heads, size, coarse_lse=coarse_lse), sum(CHUNKS), 0, size)


def published_spec(heads: int, kv_heads: int, size: int, **changes: Any) -> SparseAttentionSpec:
    """Published pooling sizes, with a budget of 7 blocks and sparse from 512 tokens on."""
    fields: dict[str, Any] = {"window_size": 256, "topk": 3, "dense_len": 512}
    return SparseAttentionSpec(heads, kv_heads, size**-0.5, **(fields | changes))


@BY_ISA
@BY_CHUNKS
@pytest.mark.parametrize("coarse_lse", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 64), (4, 2, 8), (6, 2, 128), (16, 1, 64)])
def test_rows_equal_the_reference(
    heads: int,
    kv_heads: int,
    size: int,
    coarse_lse: int,
    chunks: tuple[int, ...],
    isa: Isa,
    record_property: Callable[[str, object], None],
) -> None:
    case = case_from_nothing(heads, kv_heads, size, coarse_lse)
    record_property("near_ties_excluded", int((~case.compared).sum()))
    record_property("exact_ties_included", sum(gap == 0 for gap in case.trace.gaps.values()))
    with ThreadPool(2) as pool:
        case.check(*case.run(pool, isa, chunks))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(1, 1, 256), (3, 1, 40), (5, 1, 16), (8, 1, 64), (14, 2, 24), (16, 2, 128), (9, 1, 8)],
)
@pytest.mark.parametrize(("count", "past"), [(1, 0), (2, 63), (7, 130), (33, 301), (97, 47)])
def test_odd_sizes(heads: int, kv_heads: int, size: int, count: int, past: int) -> None:
    for spec in (
        small_spec(heads, kv_heads, size, topk=4, init_blocks=2, window_size=16),
        SparseAttentionSpec.dense(heads, kv_heads, size**-0.5),
    ):
        case = make_case(spec, count, past, size)
        with ThreadPool(2) as pool:
            for isa in ISAS:
                case.check(*case.run(pool, isa))


@pytest.mark.parametrize(("count", "past"), [(1, 1983), (2, 1500), (12, 505), (41, 1270)])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 2, 64), (16, 1, 128)])
def test_published_block_sizes(heads: int, kv_heads: int, size: int, count: int, past: int) -> None:
    for coarse_lse in (0, 1):
        case = make_case(published_spec(heads, kv_heads, size, coarse_lse=coarse_lse), count, past, size)
        with ThreadPool(2) as pool:
            for isa in ISAS:
                case.check(*case.run(pool, isa))


@pytest.mark.parametrize(("count", "past"), [(1, 5000), (3, 4090), (150, 900)])
@pytest.mark.parametrize("topk", [0, 3])
def test_results_do_not_depend_on_the_threads(count: int, past: int, topk: int) -> None:
    spec = published_spec(8, 2, 64, topk=topk)
    case = make_case(spec, count, past, 64)
    for isa in ISAS:
        results = []
        for threads in (1, 2, 3, 4):
            with ThreadPool(threads) as pool:
                results.append(case.run(pool, isa))
        case.check(*results[0])
        for output, selected in results[1:]:
            np.testing.assert_array_equal(output, results[0][0])
            np.testing.assert_array_equal(selected, results[0][1])


@BY_ISA
def test_decode_equals_prefill_row_by_row(isa: Isa) -> None:
    case = case_from_nothing(6, 2, 128, 1)
    with ThreadPool(2) as pool:
        whole, chosen = case.run(pool, isa)
        single, chosen_singly = case.run(pool, isa, (1,) * case.rows.count)
    np.testing.assert_array_equal(chosen_singly[0, case.compared], chosen[0, case.compared])
    difference = np.abs(whole - single)[0, case.compared]
    assert difference.max() <= 2 * case.tolerance


@BY_ISA
@pytest.mark.parametrize("chunks", [(200,), (150, 49, 1)], ids=["whole", "chunks"])
def test_ties_go_to_the_lowest_block(isa: Isa, chunks: tuple[int, ...]) -> None:
    spec = small_spec(8, 1, dense_len=0, topk=6)
    drawn = make_rows(spec, 200)
    every = Rows(drawn.query, np.broadcast_to(drawn.key[:, :1], drawn.key.shape).copy(), drawn.value)
    case = make_case(spec, 200, 0, SIZE, all_rows=every)
    assert sum(gap == 0 for gap in case.trace.gaps.values()) > 50
    with ThreadPool(2) as pool:
        output, selected = case.run(pool, isa, chunks)
    case.check(output, selected)
    assert selected[0, 199, 0].tolist() == [0, 1, 2, 3, 4, 10, 11, 12]


@BY_ISA
def test_scores_far_above_the_coarse_maximum_are_clamped(isa: Isa) -> None:
    spec = small_spec(2, 1, dense_len=64)
    drawn = make_rows(spec, 180)
    every = Rows(drawn.query * 30, drawn.key * 6, drawn.value)
    case = make_case(spec, 60, 120, SIZE, all_rows=every)
    with ThreadPool(2) as pool:
        case.check(*case.run(pool, isa))


@BY_ISA
def test_rotation_and_rows_of_a_wider_matrix(isa: Isa) -> None:
    spec = small_spec(4, 2)
    rows = make_rows(spec, 90, batch=2)
    angles = np.random.default_rng(5).uniform(0, 6, (2, 90, SIZE // 2)).astype(np.float32)
    rotation = (np.cos(angles), np.sin(angles))

    def rotated(array: Array) -> Array:
        first, second = np.split(array.reshape(2, 90, -1, SIZE), 2, -1)
        cosine, sine = (table[:, :, None] for table in rotation)
        turned = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
        return np.ascontiguousarray(turned.reshape(array.shape))

    merged = np.concatenate([rows.query, rows.key, rows.value], -1)
    query, key, value = np.split(merged, [4 * SIZE, 6 * SIZE], -1)
    past = np.zeros(2, np.int64)
    with ThreadPool(2) as pool:
        first, second = (AttentionCache.empty(spec, 2, 96, SIZE) for _ in range(2))
        inside = native.sparse_attention(
            pool, spec, query, key, value, first, past, rotation=rotation, isa=isa
        )
        before = native.sparse_attention(
            pool, spec, rotated(rows.query), rotated(rows.key), rows.value, second, past, isa=isa
        )
    # Float32 products may be fused or not, which can turn the last bit of a stored half.
    np.testing.assert_allclose(first.key.astype(np.float32), second.key.astype(np.float32), rtol=1e-3)
    np.testing.assert_array_equal(first.value, second.value)
    np.testing.assert_allclose(inside, before, atol=1e-3)


def test_rows_of_a_batch_keep_their_own_lengths() -> None:
    spec = small_spec(4, 2)
    cases = [make_case(spec, 9, past, SIZE) for past in (40, 101)]
    capacity = rounded(110, spec)
    cache = AttentionCache.empty(spec, 2, capacity, SIZE)
    assert cache.pooled is not None
    for b, case in enumerate(cases):
        own = case.cache()
        assert own.pooled is not None
        for target, source in ((cache.key, own.key), (cache.value, own.value), (cache.pooled, own.pooled)):
            target[b, :, : source.shape[2]] = source[0]
    query, key, value = (
        np.concatenate([getattr(case.rows, name) for case in cases]) for name in ("query", "key", "value")
    )
    with ThreadPool(2) as pool:
        got = native.sparse_attention(pool, spec, query, key, value, cache, np.array([40, 101]))
    for b, case in enumerate(cases):
        assert np.abs(got[b] - case.output[0]).max() <= case.tolerance


@BY_ISA
def test_a_query_that_is_not_a_number_stays_visible(isa: Isa) -> None:
    spec = small_spec()
    rows = make_rows(spec, 100)
    inputs = (rows.key, rows.value)
    past = np.array([0])
    bad = rows.query.copy()
    bad[0, [20, 90], :SIZE] = np.nan
    with ThreadPool(2) as pool:
        expected, got = (
            native.sparse_attention(
                pool, spec, query, *inputs, AttentionCache.empty(spec, 1, 112, SIZE), past, isa=isa
            )
            for query in (rows.query, bad)
        )
    assert np.isnan(got[0, [20, 90], :SIZE]).all()
    others = np.delete(np.arange(100), [20, 90])
    np.testing.assert_array_equal(got[0, others], expected[0, others])


def test_no_rows_change_nothing() -> None:
    spec = small_spec()
    cache = AttentionCache.empty(spec, 1, 32, SIZE)
    rows = make_rows(spec, 0)
    with ThreadPool(1) as pool:
        got = native.sparse_attention(pool, spec, rows.query, rows.key, rows.value, cache, np.array([32]))
    assert got.shape == (1, 0, 4 * SIZE) and not cache.key.any()


def test_refusals() -> None:
    spec = small_spec()
    rows = make_rows(spec, 5)
    inputs = (rows.query, rows.key, rows.value)
    cache = AttentionCache.empty(spec, 1, 32, SIZE)
    with ThreadPool(1) as pool:
        with pytest.raises(NativeError, match="5 rows after 28: the new rows do not fit"):
            native.sparse_attention(pool, spec, *inputs, cache, np.array([28]))
        assert not cache.key.any()
        with pytest.raises(NativeError, match="pooled cache: a sparse spec needs one"):
            native.sparse_attention(
                pool, spec, *inputs, AttentionCache(cache.key, cache.value, None), np.array([0])
            )
        with pytest.raises(NativeError, match=r"value: expected \(1, 5, 32\)"):
            native.sparse_attention(pool, spec, rows.query, rows.key, rows.query, cache, np.array([0]))
        wrong: Any = rows.query.astype(np.float64)
        with pytest.raises(NativeError, match="query: expected float32 rows"):
            native.sparse_attention(pool, spec, wrong, rows.key, rows.value, cache, np.array([0]))
        for size in (12, 264):
            odd = make_rows(spec, 5, size=size)
            with pytest.raises(NativeError, match="do not take this shape"):
                native.sparse_attention(
                    pool,
                    spec,
                    odd.query,
                    odd.key,
                    odd.value,
                    AttentionCache.empty(spec, 1, 32, size),
                    np.array([0]),
                )
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        AttentionCache.empty(spec, 1, 40, SIZE)
