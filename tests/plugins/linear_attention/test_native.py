from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.plugins.linear_attention import native
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from tests.plugins.linear_attention.cases import STRONGEST, WEAKEST, Array, Case, Op, make_case

ISAS = pytest.mark.parametrize("isa", available_isas(), ids=lambda isa: isa.name)


def native_op(pool: ThreadPool, spec: LinearAttentionSpec, isa: Isa | None = None) -> Op:
    """The kernel with a poisoned output and a copy of the state."""

    def run(query: Array, key: Array, value: Array, past_state: Array) -> Sequence[Array]:
        state = past_state.copy()
        out = np.full(value.shape, np.nan, np.float32)
        q, k, v = (np.ascontiguousarray(array) for array in (query, key, value))
        return native.linear_attention(pool, spec, q, k, v, state, isa=isa, out=out), state

    return run


@pytest.mark.parametrize(("size", "value_size"), [(8, 8), (64, 64), (128, 128), (64, 24), (13, 5), (128, 32)])
@pytest.mark.parametrize("heads", [1, 3, 32])
def test_odd_sizes_on_every_path(heads: int, size: int, value_size: int) -> None:
    for rows in (1, 2, 7, 47, 48, 49) if heads * size > 512 else (1, 2, 63, 64, 65, 130):
        case = make_case(rows, heads, size, value_size, batch=2 if heads == 3 else 1)
        for isa in available_isas():
            with ThreadPool(2) as pool:
                case.check(*native_op(pool, case.spec, isa)(*case.inputs))


@ISAS
def test_published_shape(isa: Isa) -> None:
    case = published()
    with ThreadPool(2) as pool:
        run = native_op(pool, case.spec, isa)
        case.check(*run(*case.inputs))
        case.check(*case.feed(run, [1, 64, 1, 63, 1]))


_PUBLISHED: list[Case] = []


def published() -> Case:
    """32 heads of 128 and 130 rows, made once."""
    if not _PUBLISHED:
        _PUBLISHED.append(make_case(130, 32, 128))
    return _PUBLISHED[0]


@ISAS
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("rows", [1, 65])
def test_threads_share_a_head_s_columns(isa: Isa, heads: int, rows: int) -> None:
    """Fewer heads than threads; columns are independent, so nothing may change but the last bits."""
    case = make_case(rows, heads, 16, 72)
    results = []
    for threads in (1, 2, 3, 4):
        with ThreadPool(threads) as pool:
            results.append(native_op(pool, case.spec, isa)(*case.inputs))
            case.check(*results[-1])
    for output, state in results[1:]:
        np.testing.assert_array_equal(output, results[0][0])
        np.testing.assert_array_equal(state, results[0][1])


@ISAS
@given(cuts=st.sets(st.integers(1, 199)), heads=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_any_cut_gives_the_same(isa: Isa, cuts: set[int], heads: int) -> None:
    case = make_case(200, heads, 8, 20)
    borders = [0, *sorted(cuts), 200]
    with ThreadPool(2) as pool:
        case.check(*case.feed(native_op(pool, case.spec, isa), np.diff(borders).tolist()))


@ISAS
@pytest.mark.parametrize("chunks", [[1000], [1] * 1000, [333, 1, 666]], ids=["chunked", "recurrent", "mixed"])
def test_strong_and_weak_decay_over_a_thousand_rows(isa: Isa, chunks: list[int]) -> None:
    """Also one so strong that powers underflow within a chunk, and none at all."""
    spec = LinearAttentionSpec((STRONGEST, WEAKEST, 0.0, -30.0), 0.25)
    case = make_case(1000, 4, 16, spec=spec)
    with ThreadPool(1) as pool:
        case.check(*case.feed(native_op(pool, spec, isa), chunks))


@ISAS
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_state_is_updated_in_place_and_nothing_else_is_written(isa: Isa, rows: int) -> None:
    case = make_case(rows, 2, 9, 19, batch=2)
    query, key, value, past = case.inputs
    guard = np.full(past.size + 64, 7, np.float32)
    state = guard[32:-32].reshape(past.shape)
    state[...] = past
    out_guard = np.full(value.size + 64, 7, np.float32)
    out = out_guard[32:-32].reshape(value.shape)
    before = [array.copy() for array in (query, key, value)]
    with ThreadPool(3) as pool:
        output = native.linear_attention(pool, case.spec, query, key, value, state, isa=isa, out=out)
    assert output is out
    case.check(out, state)
    for edges in (guard, out_guard):
        assert (edges[:32] == 7).all() and (edges[-32:] == 7).all()
    for array, old in zip((query, key, value), before, strict=True):
        np.testing.assert_array_equal(array, old)


@ISAS
@pytest.mark.parametrize("rows", [1, 66])
@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_may_be_columns_of_one_matrix(isa: Isa, rows: int, batch: int) -> None:
    case = make_case(rows, 2, 8, 12, batch=batch)
    joined = np.concatenate(case.inputs[:3], 2)
    query, key, value = joined[..., :16], joined[..., 16:32], joined[..., 32:]
    state = case.inputs[3].copy()
    with ThreadPool(2) as pool:
        output = native.linear_attention(pool, case.spec, query, key, value, state, isa=isa)
    case.check(output, state)


def test_no_rows_leave_the_state_alone() -> None:
    case = make_case(1, 2, 8)
    query, key, value, past = case.inputs
    state = past.copy()
    with ThreadPool(2) as pool:
        output = native.linear_attention(pool, case.spec, query[:, :0], key[:, :0], value[:, :0], state)
    assert output.shape == (1, 0, 16)
    np.testing.assert_array_equal(state, past)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key", lambda a: a[:, :2], r"key: expected \(1, 3, 16\), got \(1, 2, 16\)"),
        ("value", lambda a: a[..., :-1], r"value: expected \(1, 3, 16\), got \(1, 3, 15\)"),
        ("query", lambda a: a.astype(np.float64), "query: expected float32"),
        ("query", lambda a: a[..., ::-1], "query: expected float32 rows at one distance"),
        ("past_state", lambda a: a.swapaxes(2, 3), "expected a C-contiguous float32 array"),
    ],
    ids=["rows", "columns", "type", "order", "state"],
)
def test_refusals(name: str, change: Any, message: str) -> None:
    case = make_case(3, 2, 8)
    inputs = dict(zip(("query", "key", "value", "past_state"), case.inputs, strict=True))
    inputs[name] = change(inputs[name])
    with ThreadPool(1) as pool, pytest.raises(NativeError, match=message):
        native.linear_attention(pool, case.spec, *inputs.values())


def test_an_instruction_set_that_is_missing_is_refused() -> None:
    case = make_case(1, 1, 8)
    with ThreadPool(1) as pool:
        for isa in set(Isa) - set(available_isas()):
            with pytest.raises(NativeError, match="lacks the instruction set"):
                native.linear_attention(pool, case.spec, *case.inputs, isa=isa)
