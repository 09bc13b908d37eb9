"""The Triton kernels in the interpreter; ``test_triton.py`` runs this in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpm_edge.plugins.sparse_attention import reference
from cpm_edge.plugins.sparse_attention.launches import plan
from cpm_edge.plugins.sparse_attention.reference import Trace
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import Array, Rows, make_rows, rounded, small_spec
from tests.support.interpreter import run_plan

# Odd pieces that cross dense_len, block borders and the budget, then single steps.
CHUNKS = (1, 30, 33, 42, 1, 1)
# Scores are relative to the sum over windows: a gap of this part of it may turn with the order of sums.
NEAR_TIE = 1e-4
HALF = 2.0**-11


@dataclass
class Layer:
    """One layer's caches, NaN where nothing was written, and its plan."""

    spec: SparseAttentionSpec
    size: int
    capacity: int

    def __post_init__(self) -> None:
        shape = (1, self.spec.kv_num_heads, self.capacity, self.size)
        self.caches = [torch.full(shape, torch.nan, dtype=torch.float16) for _ in range(2)]
        if not self.spec.is_dense:
            pooled = (*shape[:2], self.capacity // self.spec.kernel_stride, self.size)
            self.caches.append(torch.full(pooled, torch.nan, dtype=torch.float16))
        self.past = 0
        self.plan = plan(self.spec, self.size, self.capacity)

    def step(self, *rows: Array) -> Array:
        """Output of new rows of query, key and value."""
        query, key, value = (torch.from_numpy(np.ascontiguousarray(each, np.float16)) for each in rows)
        past = torch.tensor([self.past], dtype=torch.int32)
        output = torch.full_like(query, torch.nan)
        inputs = [query, key, value, *self.caches[:2], past, *self.caches[2:]]
        run_plan(self.plan, inputs, [output, *self.caches])
        self.past += query.shape[1]
        return output.numpy()

    def feed(self, rows: Rows, chunks: Sequence[int]) -> Array:
        """Outputs of all rows given chunk by chunk."""
        starts = np.cumsum([0, *chunks])
        return np.concatenate(
            [self.step(*rows.cut(start, start + size)) for start, size in zip(starts, chunks, strict=False)],
            1,
        )


def halves(rows: Rows) -> Rows:
    """The same rows as float16 holds them."""
    return Rows(*(each.astype(np.float16).astype(np.float32) for each in rows.all()))


def rounded_means(keys: Array, kernel: int, stride: int) -> Array:
    """``reference.pooled_keys`` as they are stored."""
    return original_pooled_keys(keys, kernel, stride).astype(np.float16).astype(np.float32)


original_pooled_keys = reference.pooled_keys
original_attend = reference._attend


def attend_in_halves(query: Array, keys: Array, values: Array, scale: float) -> Array:
    """``reference._attend`` with float16 operands and sums in float32."""
    scores = query @ keys.T * np.float32(scale)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    sums = weights.astype(np.float16).astype(np.float32) @ values
    return (sums / weights.sum(1, keepdims=True)).astype(np.float16).astype(np.float32)


def expect(spec: SparseAttentionSpec, rows: Rows) -> tuple[Array, float, npt.NDArray[np.bool_]]:
    """The output, twice the error of float16 operands, and which rows (T,) are no near tie."""
    size = rows.key.shape[2] // spec.kv_num_heads
    shape = (1, spec.kv_num_heads, rounded(rows.count, spec), size)
    empty = np.zeros(shape, np.float32)
    trace = Trace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "pooled_keys", rounded_means)
        arguments = (*rows.all(), empty, empty, np.zeros(1, np.int64))
        expected, *_ = reference.sparse_attention(*arguments, spec=spec, trace=trace)
        patch.setattr(reference, "_attend", attend_in_halves)
        rough, *_ = reference.sparse_attention(*arguments, spec=spec)
    compared = np.ones(rows.count, bool)
    for (_, _, position), gap in trace.gaps.items():
        compared[position] &= not 0 < gap < NEAR_TIE
    return expected[0], 2 * float(np.abs(rough - expected).max()), compared


def check(spec: SparseAttentionSpec, size: int, chunks: Sequence[int], seed: int = 0) -> Layer:
    rows = halves(make_rows(spec, sum(chunks), size=size, seed=seed))
    layer = Layer(spec, size, rounded(rows.count, spec))
    got = layer.feed(rows, chunks)[0]
    expected, tolerance, compared = expect(spec, rows)
    error = np.abs(got - expected).max(1)
    assert compared.mean() > 0.9
    assert error[compared].max() <= tolerance, f"{error[compared].max():.2e} > {tolerance:.2e}"
    check_caches(layer, rows)
    return layer


def check_caches(layer: Layer, rows: Rows) -> None:
    """Rows and pooled keys are where they belong, and nothing else was written."""
    for cache, new in zip(layer.caches, (rows.key, rows.value), strict=False):
        expected = np.full(cache.shape[1:], np.nan, np.float16)
        expected[:, : rows.count] = new[0].reshape(rows.count, -1, layer.size).swapaxes(0, 1)
        np.testing.assert_array_equal(cache[0].numpy(), expected)
    for pooled in layer.caches[2:]:
        keys = layer.caches[0][0, :, : rows.count].float().numpy()
        spec = layer.spec
        for head, stored in zip(keys, pooled[0].numpy(), strict=True):
            means = original_pooled_keys(head, spec.kernel_size, spec.kernel_stride)
            np.testing.assert_allclose(stored[: len(means)], means, rtol=HALF, atol=2.0**-24)
            assert np.isnan(stored[len(means) :]).all()


@pytest.mark.parametrize(("heads", "kv_heads", "coarse"), [(4, 2, 1), (3, 1, 0), (16, 1, 1), (2, 2, 0)])
def test_odd_chunks_beyond_dense_len(heads: int, kv_heads: int, coarse: int) -> None:
    spec = small_spec(heads, kv_heads, coarse_lse=coarse, dense_len=48, window_size=16)
    check(spec, 16, CHUNKS)
