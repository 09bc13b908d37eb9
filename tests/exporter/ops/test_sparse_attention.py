"""The op in torch: eager against the reference, one node when exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.exporter.ops.sparse_attention import sparse_attention
from cpm_edge.plugins.sparse_attention import reference
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import (
    CHUNKS,
    GROUPS,
    Array,
    Rows,
    empty_cache,
    expect,
    expected_of_group,
    feed,
    make_rows,
    rounded,
    small_spec,
)
from tests.plugins.sparse_attention.engines import Run

Record = Callable[[str, object], None]


def eager_op(spec: SparseAttentionSpec) -> Run:
    def run(*inputs: Array) -> Sequence[Array]:
        tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in inputs)
        return [tensor.numpy() for tensor in sparse_attention(*tensors, spec=spec)]

    return run


@pytest.mark.parametrize("coarse_lse", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_odd_chunks_and_single_steps(
    heads: int, kv_heads: int, coarse_lse: int, record_property: Record
) -> None:
    rows, expected = expected_of_group(heads, kv_heads, coarse_lse, batch=2 if heads == 6 else 1)
    spec = small_spec(heads, kv_heads, coarse_lse=coarse_lse)
    expected.check(feed(eager_op(spec), spec, rows, CHUNKS), record_property)
    expected.check(feed(eager_op(spec), spec, rows, [rows.count]), record_property)


def test_exact_ties_go_to_the_lowest_index(record_property: Record) -> None:
    spec = small_spec(topk=5)
    drawn = make_rows(spec, 300)
    rows = Rows(np.zeros_like(drawn.query), drawn.key, drawn.value)
    expect(spec, rows).check(feed(eager_op(spec), spec, rows, [299, 1]), record_property)


def test_rows_of_a_batch_may_have_different_lengths() -> None:
    spec = small_spec()
    rows = make_rows(spec, 220, batch=2)
    rng = np.random.default_rng(9)
    keys = rng.standard_normal(empty_cache(spec, rows, rounded(360, spec)).shape).astype(np.float32)
    inputs = (*rows.cut(0, 220), keys, keys[::-1].copy(), np.array([5, 140]))
    for expected, got in zip(
        reference.sparse_attention(*inputs, spec=spec), eager_op(spec)(*inputs), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=5e-6)


@st.composite
def specs(draw: st.DrawFn) -> SparseAttentionSpec:
    """Every combination of small settings that the spec takes, topk 0 included."""
    stride, kv_heads = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    init = draw(st.integers(0, 2))
    return SparseAttentionSpec(
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 5])),
        kv_num_heads=kv_heads,
        scale=draw(st.sampled_from([0.1, 0.5, 1.0])),
        kernel_size=2 * stride,
        kernel_stride=stride,
        block_size=4 * stride,
        init_blocks=init,
        window_size=4 * stride * draw(st.integers(0, 3)),
        topk=draw(st.just(0) | st.integers(init + 1, init + 4)),
        dense_len=draw(st.sampled_from([0, 1, 17, 1000])),
        coarse_lse=draw(st.sampled_from([0, 1])),
    )


@settings(max_examples=60, deadline=None)
@given(spec=specs(), data=st.data())
def test_small_settings(spec: SparseAttentionSpec, data: st.DataObject) -> None:
    chunks = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=4), label="chunks")
    batch = data.draw(st.sampled_from([1, 2]), label="batch")
    rows = make_rows(spec, sum(chunks), batch=batch, size=4, seed=data.draw(st.integers(0, 99), label="seed"))
    expected = expect(spec, rows)
    got = feed(eager_op(spec), spec, rows, chunks)
    error = np.abs(got - expected.output).max(-1, initial=0)[expected.compared]
    assert error.max(initial=0) <= expected.tolerance


def test_it_is_one_node_when_exported() -> None:
    spec = small_spec(6, 2)
    rows = make_rows(spec, 3)

    class Attention(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return sparse_attention(*inputs, spec=spec)

    cache = empty_cache(spec, rows, 16)
    inputs = (*rows.cut(0, 3), cache, cache.copy(), np.zeros(1, np.int64))
    program = torch.export.export(Attention(), tuple(torch.from_numpy(i.copy()) for i in inputs))
    assert [tuple(v.meta["val"].shape) for v in program.graph.output_node().args[0]] == [
        (1, 3, 96), (1, 2, 16, 16), (1, 2, 16, 16),
    ]  # fmt: skip
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert len([node for node in calls if "symbolic" in str(node.target)]) == 1
