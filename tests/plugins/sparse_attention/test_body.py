"""The ONNX function bodies against the reference, on both engines that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cpm_edge.plugins.sparse_attention.body import functions
from cpm_edge.plugins.sparse_attention.reference import sparse_attention
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import (
    CHUNKS,
    GROUPS,
    Rows,
    empty_cache,
    expect,
    expected_of_group,
    feed,
    make_rows,
    rounded,
    small_spec,
)
from tests.plugins.sparse_attention.engines import Run, onnxruntime_op, openvino_op

ENGINES = pytest.mark.parametrize(
    ("make", "grow"), [(onnxruntime_op, False), (openvino_op, True)], ids=["onnxruntime", "openvino"]
)
Make = Callable[..., Run]
Record = Callable[[str, object], None]


@ENGINES
@pytest.mark.parametrize("coarse_lse", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_odd_chunks_and_single_steps(
    make: Make, grow: bool, heads: int, kv_heads: int, coarse_lse: int, record_property: Record
) -> None:
    # Two sequences where the group is no power of two.
    rows, expected = expected_of_group(heads, kv_heads, coarse_lse, batch=2 if heads == 6 else 1)
    spec = small_spec(heads, kv_heads, coarse_lse=coarse_lse)
    expected.check(feed(make(spec), spec, rows, CHUNKS, grow=grow), record_property)


@ENGINES
def test_one_chunk(make: Make, grow: bool, record_property: Record) -> None:
    rows, expected = expected_of_group(4, 2, 1, batch=1)
    spec = small_spec(4, 2)
    expected.check(feed(make(spec), spec, rows, [rows.count], grow=grow), record_property)


@ENGINES
@pytest.mark.parametrize(
    "changes",
    [
        {"dense_len": 0},
        {"init_blocks": 0, "window_size": 0, "topk": 1, "dense_len": 0},
        {"init_blocks": 2, "window_size": 48, "topk": 4},
        {"topk": 40},
        {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 16},
        {"kernel_size": 2, "kernel_stride": 1, "block_size": 4, "window_size": 4, "dense_len": 30},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_other_settings(make: Make, grow: bool, changes: dict[str, Any], record_property: Record) -> None:
    spec = small_spec(**changes)
    rows = make_rows(spec, 130, seed=3)
    expect(spec, rows).check(feed(make(spec), spec, rows, [45, 1, 83, 1], grow=grow), record_property)


@ENGINES
def test_an_odd_head_size(make: Make, grow: bool, record_property: Record) -> None:
    spec = small_spec(6, 2, size=10)
    rows = make_rows(spec, 131, size=10)
    expect(spec, rows).check(feed(make(spec, size=10), spec, rows, [70, 60, 1], grow=grow), record_property)


@ENGINES
def test_topk_zero(make: Make, grow: bool, record_property: Record) -> None:
    spec = SparseAttentionSpec(4, 2, 0.25, 8, 4, 16, 1, 32, topk=0, dense_len=0)
    rows = make_rows(spec, 90)
    expect(spec, rows).check(feed(make(spec), spec, rows, [50, 39, 1], grow=grow), record_property)


@ENGINES
def test_exact_ties_go_to_the_lowest_index(make: Make, grow: bool, record_property: Record) -> None:
    """A query of zeros ties every free block, in every row beyond the budget."""
    spec = small_spec(topk=5)
    drawn = make_rows(spec, 300)
    rows = Rows(np.zeros_like(drawn.query), drawn.key, drawn.value)
    expected = expect(spec, rows)
    over_budget = 300 - 7 * 16
    assert sum(gap == 0 for gap in expected.trace.gaps.values()) == 2 * over_budget
    expected.check(feed(make(spec), spec, rows, [299, 1], grow=grow), record_property)


def test_rows_of_a_batch_may_have_different_lengths() -> None:
    """Only the buffer form can hold them: a grown cache has one length."""
    spec = small_spec()
    rows = make_rows(spec, 220, batch=2)
    past = np.array([5, 140])
    rng = np.random.default_rng(9)
    keys = rng.standard_normal(empty_cache(spec, rows, rounded(360, spec)).shape).astype(np.float32)
    values = rng.standard_normal(keys.shape).astype(np.float32)
    inputs = (*rows.cut(0, 220), keys, values, past)
    for expected, got in zip(
        sparse_attention(*inputs, spec=spec), onnxruntime_op(spec)(*inputs), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=5e-6)


@ENGINES
def test_the_caches_take_the_new_rows(make: Make, grow: bool) -> None:
    spec = small_spec()
    rows = make_rows(spec, 20, batch=2)
    capacity = 0 if grow else 48
    empty = empty_cache(spec, rows, capacity)
    _, keys, values = make(spec)(*rows.cut(0, 20), empty, empty, np.zeros(2, np.int64))
    for cache, new in ((keys, rows.key), (values, rows.value)):
        np.testing.assert_array_equal(cache[:, :, :20], new.reshape(2, 20, 2, 16).swapaxes(1, 2))
        assert cache.shape[2] == (20 if grow else 48)
        assert not cache[:, :, 20:].any()


def test_garbage_behind_the_valid_rows_does_not_matter() -> None:
    """After a rewind the buffer still holds the rows that were dropped."""
    spec = small_spec()
    rows = make_rows(spec, 200)
    run = onnxruntime_op(spec)
    clean = empty_cache(spec, rows, 208)
    dirty = np.full_like(clean, 1e4)
    past = np.zeros(1, np.int64)
    np.testing.assert_allclose(
        run(*rows.cut(0, 200), dirty, dirty, past)[0],
        run(*rows.cut(0, 200), clean, clean, past)[0],
        atol=1e-6,
    )


def test_the_bodies_are_fresh_copies_for_the_opset_asked_for() -> None:
    first, second = functions(opset=23), functions(opset=23)
    assert [f.name for f in first][-1] == "SparseAttention"
    assert [f.name for f in functions(grow=True)][-1] == "SparseAttention"
    assert {f.opset_imports[""] for f in first} == {23}
    assert not {id(f) for f in first} & {id(f) for f in second}


@ENGINES
@pytest.mark.parametrize("opset", [21, 22, 23])
def test_the_opsets_of_our_targets(make: Make, grow: bool, opset: int, record_property: Record) -> None:
    spec = small_spec()
    rows = make_rows(spec, 120)
    expect(spec, rows).check(feed(make(spec, opset=opset), spec, rows, [119, 1], grow=grow), record_property)
