from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cpm_edge.plugins.sparse_attention.reference import Trace, block_scores, pooled_keys, sparse_attention
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import (
    CHUNKS,
    SIZE,
    Array,
    Rows,
    empty_cache,
    feed,
    make_rows,
    rounded,
    small_spec,
)

LENGTH = sum(CHUNKS)


def whole(spec: SparseAttentionSpec, rows: Rows, trace: Trace | None = None) -> Array:
    def op(*inputs: Array) -> Sequence[Array]:
        return sparse_attention(*inputs, spec=spec, trace=trace)

    return feed(op, spec, rows, [rows.count])


def plain_attention(spec: SparseAttentionSpec, rows: Rows) -> Array:
    """Causal grouped-query attention as a textbook writes it, one sequence, float64: (1, T, Hq * D)."""
    query, key, value = (
        array[0].astype(np.float64).reshape(rows.count, -1, SIZE).swapaxes(0, 1)
        for array in (rows.query, rows.key, rows.value)
    )
    key, value = (np.repeat(array, spec.group, 0) for array in (key, value))
    scores = np.where(np.tri(rows.count, dtype=bool), query @ key.swapaxes(1, 2) * spec.scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    output = (weights / weights.sum(-1, keepdims=True)) @ value
    merged: Array = output.swapaxes(0, 1).reshape(1, rows.count, -1)
    return merged


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_topk_zero_is_plain_attention(heads: int, kv_heads: int) -> None:
    spec = SparseAttentionSpec.dense(heads, kv_heads, SIZE**-0.5)
    rows = make_rows(spec, 100)
    np.testing.assert_allclose(whole(spec, rows), plain_attention(spec, rows), atol=2e-6)


def test_a_budget_for_all_blocks_is_plain_attention() -> None:
    spec = small_spec(topk=30, dense_len=0)
    rows = make_rows(spec, 300)
    trace = Trace()
    np.testing.assert_allclose(whole(spec, rows, trace), plain_attention(spec, rows), atol=2e-6)
    assert len(trace.selected) == 600 and not trace.gaps


def test_rows_below_dense_len_see_everything() -> None:
    spec = small_spec(dense_len=200)
    rows, trace = make_rows(spec, 230), Trace()
    output = whole(spec, rows, trace)
    dense = plain_attention(spec, rows)
    np.testing.assert_allclose(output[:, :199], dense[:, :199], atol=2e-6)
    assert np.abs(output[:, 199:] - dense[:, 199:]).max(-1).min() > 1e-3
    assert {position for _, _, position in trace.selected} == set(range(199, 230))


@pytest.mark.parametrize("chunks", [CHUNKS, [1] * LENGTH], ids=["odd chunks", "decode"])
@pytest.mark.parametrize("coarse_lse", [0, 1])
def test_chunks_do_not_change_anything(chunks: Sequence[int], coarse_lse: int) -> None:
    spec = small_spec(coarse_lse=coarse_lse)
    rows = make_rows(spec, LENGTH)

    def op(*inputs: Array) -> Sequence[Array]:
        return sparse_attention(*inputs, spec=spec)

    np.testing.assert_array_equal(feed(op, spec, rows, chunks), whole(spec, rows))


@pytest.mark.parametrize(("init_blocks", "window_size", "topk"), [(1, 32, 3), (0, 0, 1), (2, 48, 3)])
def test_the_selection_holds_the_forced_blocks_and_fills_the_budget(
    init_blocks: int, window_size: int, topk: int
) -> None:
    spec = small_spec(init_blocks=init_blocks, window_size=window_size, topk=topk, dense_len=0)
    trace = Trace()
    whole(spec, make_rows(spec, 200), trace)
    assert len(trace.selected) == 400
    for (_, _, position), chosen in trace.selected.items():
        last = position // 16
        local = range(max(last - window_size // 16, 0), last + 1)
        forced = set(local) | set(range(min(init_blocks, last + 1)))
        assert len(forced) <= spec.budget
        assert forced <= set(chosen.tolist())
        assert len(set(chosen.tolist())) == len(chosen) == min(spec.budget, last + 1)
        assert chosen.max() <= last


def by_hand(query: Array, keys: Array, spec: SparseAttentionSpec) -> list[float]:
    """Exact block scores with loops over windows and heads, float64, before the forced blocks."""
    count = (len(keys) - 8) // 4 + 1
    means = [sum(keys[4 * j + i].astype(np.float64) for i in range(8)) / 8 for j in range(count)]
    shared = np.zeros(count)
    for head in query.astype(np.float64):
        terms = np.array([np.exp(head @ mean * spec.scale) for mean in means])
        shared += terms / terms.sum()
    blocks = (len(keys) - 1) // 16 + 1
    windows = [[shared[j] for j in range(4 * b - 1, 4 * b + 4) if 0 <= j < count] for b in range(blocks)]
    return [max(window, default=-np.inf) for window in windows]


@pytest.mark.parametrize("length", [97, 111, 112, 128])
def test_exact_block_scores_by_hand(length: int) -> None:
    spec = small_spec(coarse_lse=0)
    rows = make_rows(spec, length)
    query, keys = rows.query[0, -1].reshape(2, 2, SIZE)[1], rows.key[0].reshape(length, 2, SIZE)[:, 1]
    got = block_scores(query, keys, spec)
    last = (length - 1) // 16
    assert np.isinf(got[[0, last - 2, last - 1, last]]).all()
    np.testing.assert_allclose(got[1 : last - 2], by_hand(query, keys, spec)[1 : last - 2], rtol=1e-5)


def test_the_coarse_normaliser_reweights_the_heads() -> None:
    """Within one head the order of the blocks stays; over a group their sums differ."""
    rows = make_rows(small_spec(2, 1), 200)
    query, keys = rows.query[0, -1].reshape(2, SIZE), rows.key[0]
    exact, coarse = (small_spec(2, 1, coarse_lse=value) for value in (0, 1))
    for head in query:
        first, second = (np.argsort(block_scores(head[None], keys, s)[1:-3]) for s in (exact, coarse))
        np.testing.assert_array_equal(first, second)
    ratio = block_scores(query, keys, coarse)[1:-3] / block_scores(query, keys, exact)[1:-3]
    assert np.ptp(ratio) > 1e-3


def test_a_row_without_a_coarse_window_uses_its_exact_normaliser() -> None:
    rows = make_rows(small_spec(4, 2), 33)
    query, keys = rows.query[0, -1].reshape(2, 2, SIZE)[0], rows.key[0].reshape(33, 2, SIZE)[:, 0]
    options: dict[str, Any] = {"init_blocks": 0, "window_size": 0, "topk": 1}
    exact, coarse = (small_spec(coarse_lse=value, **options) for value in (0, 1))
    short, enough = keys[:31], keys[:33]  # a coarse window is 32 keys
    np.testing.assert_array_equal(block_scores(query, short, coarse), block_scores(query, short, exact))
    assert (block_scores(query, enough, coarse) != block_scores(query, enough, exact)).any()


def test_a_huge_exponent_is_clamped() -> None:
    """The coarse maximum can be far below the scores; infinities would make every block a tie."""
    spec = small_spec(2, 1, coarse_lse=1)
    rows = make_rows(spec, 200)
    keys = rows.key[0].copy()
    keys[64:72] = 40 * rows.query[0, -1].reshape(2, SIZE)[0]
    scores = block_scores(rows.query[0, -1].reshape(2, SIZE), keys, spec)
    assert np.isfinite(scores[1:-3]).all() and scores[1:-3].argmax() == 3  # block 4, after the init block


def test_exact_ties_go_to_the_lowest_index() -> None:
    """A query of zeros gives every window the same share, whatever the keys are."""
    spec = small_spec(topk=5)
    rows, trace = make_rows(spec, 200), Trace()
    whole(spec, Rows(np.zeros_like(rows.query), rows.key, rows.value), trace)
    last = 199 // 16
    for head in range(2):
        np.testing.assert_array_equal(trace.selected[0, head, 199], [0, 1, 2, 3, last - 2, last - 1, last])
        assert trace.gaps[0, head, 199] == 0


def test_neighbouring_blocks_tie_by_construction() -> None:
    """The window across a border counts for both blocks; where it is the best of both, they tie."""
    spec = small_spec()
    trace = Trace()
    whole(spec, make_rows(spec, 300), trace)
    ties = [where for where, gap in trace.gaps.items() if gap == 0]
    assert len(ties) > 0.03 * len(trace.gaps)
    for where in ties:
        chosen = set(trace.selected[where].tolist())
        free = [block for block in chosen if 0 < block < where[2] // 16 - 2]
        # The tie's rejected half is the right neighbour of the last free block.
        assert any(block + 1 not in chosen for block in free)


def test_the_pooled_cache_holds_the_complete_windows() -> None:
    spec = small_spec()
    rows = make_rows(spec, 50, batch=2)
    keys = empty_cache(spec, rows, rounded(50, spec))
    pooled = np.full((2, 2, 16, SIZE), 7, np.float32)
    past = np.zeros(2, np.int64)
    for start, stop in ((0, 7), (7, 8), (8, 31), (31, 50)):
        _, keys, _, pooled = sparse_attention(*rows.cut(start, stop), keys, keys, past, pooled, spec=spec)
        past = past + stop - start
    count = (50 - 8) // 4 + 1
    assert count == 11
    for batch in range(2):
        for head in range(2):
            expected = pooled_keys(rows.key[batch].reshape(50, 2, SIZE)[:, head], 8, 4)
            np.testing.assert_array_equal(pooled[batch, head, :count], expected)
            # Rows of windows that are not complete yet are left as they were.
            assert (pooled[batch, head, count:] == 7).all()


def test_a_coarse_key_is_the_mean_of_four_pooled_ones() -> None:
    keys = make_rows(small_spec(), 100).key[0, :, :SIZE].astype(np.float64)
    fine, coarse = pooled_keys(keys, 8, 4), pooled_keys(keys, 32, 16)
    for j, key in enumerate(coarse):
        np.testing.assert_allclose(key, fine[[4 * j, 4 * j + 2, 4 * j + 4, 4 * j + 6]].mean(0), rtol=1e-12)


def test_rows_that_do_not_fit_are_refused() -> None:
    spec = small_spec()
    rows = make_rows(spec, 20)
    keys = empty_cache(spec, rows, 32)
    with pytest.raises(ValueError, match="cache: 33 rows do not fit a capacity of 32"):
        sparse_attention(rows.query, rows.key, rows.value, keys, keys, np.array([13]), spec=spec)
