from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from cpm_edge.plugins.sparse_attention import native
from cpm_edge.plugins.sparse_attention.cache import CACHE_TYPES, AttentionCache
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import CHUNKS, SIZE, Array, Rows, make_rows, rounded, small_spec
from tests.plugins.sparse_attention.native_cases import case_from_nothing, make_case, published_spec

# The other vector paths are the AVX2 one.
ISAS = [isa for isa in available_isas() if isa in (Isa.SCALAR, Isa.AVX2)]
BY_ISA = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
BY_TYPE = pytest.mark.parametrize("dtype", CACHE_TYPES)
BY_CHUNKS = pytest.mark.parametrize(
    "chunks", [CHUNKS, (sum(CHUNKS),)], ids=lambda chunks: f"{len(chunks)}chunks"
)


@BY_ISA
@BY_TYPE
@BY_CHUNKS
@pytest.mark.parametrize("coarse_lse", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 64), (4, 2, 8), (6, 2, 128), (16, 1, 64)])
def test_rows_equal_the_reference(
    heads: int,
    kv_heads: int,
    size: int,
    coarse_lse: int,
    chunks: tuple[int, ...],
    dtype: str,
    isa: Isa,
    record_property: Callable[[str, object], None],
) -> None:
    case = case_from_nothing(heads, kv_heads, size, coarse_lse, dtype)
    record_property("near_ties_excluded", int((~case.compared).sum()))
    record_property("exact_ties_included", sum(gap == 0 for gap in case.trace.gaps.values()))
    with ThreadPool(2) as pool:
        case.check(*case.run(pool, isa, chunks))


@BY_TYPE
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(1, 1, 256), (3, 1, 40), (5, 1, 16), (8, 1, 64), (14, 2, 24), (16, 2, 128), (9, 1, 8)],
)
@pytest.mark.parametrize(("count", "past"), [(1, 0), (2, 63), (7, 130), (33, 301), (97, 47)])
def test_odd_sizes(heads: int, kv_heads: int, size: int, count: int, past: int, dtype: str) -> None:
    for spec in (
        small_spec(heads, kv_heads, size, topk=4, init_blocks=2, window_size=16),
        SparseAttentionSpec.dense(heads, kv_heads, size**-0.5),
    ):
        case = make_case(spec, count, past, size, dtype=dtype)
        with ThreadPool(2) as pool:
            for isa in ISAS:
                case.check(*case.run(pool, isa))


@BY_TYPE
@pytest.mark.parametrize(("count", "past"), [(1, 1983), (2, 1500), (12, 505), (41, 1270)])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(16, 2, 64), (16, 1, 128)])
def test_published_block_sizes(
    heads: int, kv_heads: int, size: int, count: int, past: int, dtype: str
) -> None:
    for coarse_lse in (0, 1):
        spec = published_spec(heads, kv_heads, size, coarse_lse=coarse_lse)
        case = make_case(spec, count, past, size, dtype=dtype)
        with ThreadPool(2) as pool:
            for isa in ISAS:
                case.check(*case.run(pool, isa))


@BY_TYPE
@pytest.mark.parametrize(("count", "past"), [(1, 5000), (3, 4090), (150, 900)])
@pytest.mark.parametrize("topk", [0, 3])
def test_results_do_not_depend_on_the_threads(count: int, past: int, topk: int, dtype: str) -> None:
    spec = published_spec(8, 2, 64, topk=topk)
    case = make_case(spec, count, past, 64, dtype=dtype)
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
@BY_TYPE
def test_decode_equals_prefill_row_by_row(dtype: str, isa: Isa) -> None:
    case = case_from_nothing(6, 2, 128, 1, dtype)
    with ThreadPool(2) as pool:
        whole, chosen = case.run(pool, isa)
        single, chosen_singly = case.run(pool, isa, (1,) * case.rows.count)
    np.testing.assert_array_equal(chosen_singly[0, case.compared], chosen[0, case.compared])
    difference = np.abs(whole - single)[0, case.compared]
    assert difference.max() <= 2 * case.tolerance


@BY_ISA
@BY_TYPE
@pytest.mark.parametrize("chunks", [(200,), (150, 49, 1)], ids=["whole", "chunks"])
def test_ties_go_to_the_lowest_block(isa: Isa, dtype: str, chunks: tuple[int, ...]) -> None:
    spec = small_spec(8, 1, dense_len=0, topk=6)
    drawn = make_rows(spec, 200)
    every = Rows(drawn.query, np.broadcast_to(drawn.key[:, :1], drawn.key.shape).copy(), drawn.value)
    case = make_case(spec, 200, 0, SIZE, dtype=dtype, all_rows=every)
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
    for b, case in enumerate(cases):
        own = case.cache()
        pairs = ((cache.key, own.key), (cache.value, own.value), (cache.pooled, own.pooled))
        for target, source in pairs:
            assert target is not None and source is not None
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
