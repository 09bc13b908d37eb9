"""The Triton kernels in the interpreter; ``test_triton.py`` runs this in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# A gap of this size between two scores may turn with the order of sums in float32.
NEAR_TIE = 1e-5
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


def rounded_means(spec: SparseAttentionSpec) -> Callable[[Array, int, int], Array]:
    """``reference.pooled_keys`` as they are stored; coarse ones are means of those."""

    def means(keys: Array, kernel: int, stride: int) -> Array:
        fine = original_pooled_keys(keys, spec.kernel_size, spec.kernel_stride)
        fine = fine.astype(np.float16).astype(np.float32)
        if kernel == spec.kernel_size:
            return fine
        count = max((len(fine) + 1) // 4 - 1, 0)
        parts = np.stack([fine[2 * part :: 4][:count] for part in range(4)])
        coarse: Array = parts.mean(0).astype(np.float16).astype(np.float32)
        return coarse

    return means


original_pooled_keys = reference.pooled_keys
original_attend = reference._attend


def attend_in_halves(query: Array, keys: Array, values: Array, scale: float) -> Array:
    """``reference._attend`` with float16 operands and sums in float32."""
    scores = query @ keys.T * np.float32(scale)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    sums = weights.astype(np.float16).astype(np.float32) @ values
    attended: Array = (sums / weights.sum(1, keepdims=True)).astype(np.float16).astype(np.float32)
    return attended


@dataclass(frozen=True)
class Expected:
    """The output (T, Hq * D), twice the error of float16 operands, and which rows (T,) are no near tie."""

    output: Array
    tolerance: float
    compared: npt.NDArray[np.bool_]
    trace: Trace

    def check(self, got: Array) -> None:
        error = np.abs(got - self.output).max(1)[self.compared]
        assert self.compared.mean() > 0.9
        assert error.max() <= self.tolerance, f"{error.max():.2e} > {self.tolerance:.2e}"


def expect(spec: SparseAttentionSpec, rows: Rows, size: int, first: int = 0) -> Expected:
    """What the reference says about the rows from ``first`` on."""
    caches = [np.zeros((1, spec.kv_num_heads, rounded(rows.count, spec), size), np.float32) for _ in range(2)]
    for cache, new in zip(caches, (rows.key, rows.value), strict=True):
        cache[0, :, :first] = by_head(new[:, :first], size)
    trace = Trace()
    arguments = (*rows.cut(first, rows.count), *caches, np.full(1, first, np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "pooled_keys", rounded_means(spec))
        exact, *_ = reference.sparse_attention(*arguments, spec=spec, trace=trace)
        patch.setattr(reference, "_attend", attend_in_halves)
        rough, *_ = reference.sparse_attention(*arguments, spec=spec)
    compared = np.ones(rows.count - first, bool)
    for (_, _, position), gap in trace.gaps.items():
        compared[position - first] &= not 0 < gap < NEAR_TIE
    return Expected(exact[0], 2 * float(np.abs(rough - exact).max()), compared, trace)


def by_head(rows: Array, size: int) -> Array:
    """(1, T, heads * D) to (heads, T, D)."""
    heads: Array = rows[0].reshape(rows.shape[1], rows.shape[2] // size, size).swapaxes(0, 1)
    return heads


def check(spec: SparseAttentionSpec, size: int, chunks: Sequence[int]) -> None:
    check_rows(spec, halves(make_rows(spec, sum(chunks), size=size)), size, chunks)


def check_rows(spec: SparseAttentionSpec, rows: Rows, size: int, chunks: Sequence[int]) -> Expected:
    layer = Layer(spec, size, rounded(rows.count, spec))
    expected = expect(spec, rows, size)
    expected.check(layer.feed(rows, chunks)[0])
    check_caches(layer, rows)
    return expected


def check_caches(layer: Layer, rows: Rows) -> None:
    """Rows and pooled keys are where they belong, and nothing else was written."""
    for cache, new in zip(layer.caches, (rows.key, rows.value), strict=False):
        expected = np.full(cache.shape[1:], np.nan, np.float16)
        expected[:, : rows.count] = by_head(new, layer.size)
        np.testing.assert_array_equal(cache[0].numpy(), expected)
    for pooled in layer.caches[2:]:
        keys = layer.caches[0][0, :, : rows.count].float().numpy()
        spec = layer.spec
        for head, stored in zip(keys, pooled[0].numpy(), strict=True):
            means = original_pooled_keys(head, spec.kernel_size, spec.kernel_stride)
            np.testing.assert_allclose(stored[: len(means)], means, rtol=HALF, atol=2.0**-24)
            assert np.isnan(stored[len(means) :]).all()


# More than 32 rows are not split, and a single one is a decode step.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "coarse", "chunks"),
    [(4, 2, 1, (1, 21, 55, 1)), (3, 1, 0, (33, 20, 37, 1, 1)), (16, 1, 1, (62, 5, 1))],
)
def test_odd_chunks_beyond_dense_len(heads: int, kv_heads: int, coarse: int, chunks: tuple[int, ...]) -> None:
    spec = small_spec(heads, kv_heads, coarse_lse=coarse, dense_len=28, window_size=16)
    check(spec, 16, chunks)


def test_sparse_from_the_first_position_on() -> None:
    """Before the first window is complete there is nothing to choose, before the first coarse one no sum."""
    check(small_spec(2, 1, dense_len=0, window_size=0, topk=2), 16, (1, 2, 5, 47, 1))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 20), (5, 1, 128), (2, 2, 64)])
def test_dense_layers(heads: int, kv_heads: int, size: int) -> None:
    check(SparseAttentionSpec.dense(heads, kv_heads, size**-0.5), size, (1, 70, 9, 1))


def test_a_cache_below_dense_len_is_attended_to_as_a_whole() -> None:
    check(small_spec(4, 2, dense_len=200), 16, (37, 10, 1))


def test_ties_go_to_the_lowest_block() -> None:
    spec = small_spec(2, 1, dense_len=0, window_size=16)
    rows = halves(make_rows(spec, 120))
    rows.key[:] = rows.key[:, :1]
    expected = check_rows(spec, rows, 16, (81, 38, 1))
    assert expected.trace.selected[0, 0, 119].tolist() == [0, 1, 6, 7]
    assert len(expected.trace.gaps) > 50 and not any(expected.trace.gaps.values())


def test_published_settings_read_nothing_but_the_chosen_blocks() -> None:
    spec, size, past, count = SparseAttentionSpec(16, 1, 0.125), 64, 8190, 3
    rows = halves(make_rows(spec, past + count + 1, size=size))
    layer = Layer(spec, size, rounded(rows.count, spec))
    for cache, new in zip(layer.caches, (rows.key, rows.value), strict=False):
        cache[0, :, :past] = torch.from_numpy(by_head(new[:, :past], size))
    means = original_pooled_keys(rows.key[0, :past], spec.kernel_size, spec.kernel_stride)
    layer.caches[2][0, 0, : len(means)] = torch.from_numpy(means)
    layer.past = past
    expected = expect(spec, rows, size, past)
    assert sorted(expected.trace.selected) == [(0, 0, position) for position in range(8191, 8194)]
    got = layer.step(*rows.cut(past, past + count))[0]
    unused = np.setdiff1d(np.arange(129), expected.trace.selected[0, 0, 8193])
    assert len(unused) == 129 - 96 and expected.compared[-1]
    for cache in layer.caches[:2]:
        cache[0, 0].view(129, 64, size)[unused] = torch.nan
    expected.check(np.concatenate([got, layer.step(*rows.cut(past + count, rows.count))[0]]))


def test_a_position_beyond_the_cache_stays_in_its_buffers() -> None:
    spec = small_spec(4, 2, dense_len=16, window_size=16)
    layer = Layer(spec, 16, 48)
    rows = halves(make_rows(spec, 48))
    layer.feed(rows, (48,))
    memories = []
    for index, cache in enumerate(layer.caches):
        memory = torch.full((cache.numel() + 2048,), 7.0, dtype=torch.float16)
        layer.caches[index] = memory[1024:-1024].view(cache.shape)
        layer.caches[index].copy_(cache)
        memories.append(memory)
    for past in (1 << 30, -5):
        layer.past = past
        assert np.isfinite(layer.step(*rows.cut(0, 2))).all()
    assert all((memory[:1024] == 7).all() and (memory[-1024:] == 7).all() for memory in memories)
