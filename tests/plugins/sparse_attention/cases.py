"""Inputs for the op, its reference in two precisions, and feeding any implementation in chunks."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cpm_edge.plugins.sparse_attention import reference
from cpm_edge.plugins.sparse_attention.reference import Trace
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

Array = npt.NDArray[Any]
# query, key, value, key_cache, value_cache, past_length -> output, present_key, present_value
Op = Callable[..., Sequence[Array]]

NEAR_TIE = 1e-6
LEAST_TOLERANCE = 2e-6
SIZE = 16

# Odd pieces that cross dense_len, block borders and the budget, then single steps.
CHUNKS = (1, 30, 33, 97, 111, 5, 1, 1, 1)
GROUPS = ((2, 2), (4, 2), (6, 2), (16, 1))


def small_spec(heads: int = 4, kv_heads: int = 2, size: int = SIZE, **changes: Any) -> SparseAttentionSpec:
    """Blocks of 16 tokens, a budget of 5 of them, sparse from 64 tokens on."""
    fields: dict[str, Any] = {
        "kernel_size": 8,
        "kernel_stride": 4,
        "block_size": 16,
        "init_blocks": 1,
        "window_size": 32,
        "topk": 3,
        "dense_len": 64,
    }
    return SparseAttentionSpec(heads, kv_heads, size**-0.5, **(fields | changes))


@dataclass(frozen=True)
class Rows:
    """New rows: query (B, T, Hq * D), key and value (B, T, Hkv * D), float32."""

    query: Array
    key: Array
    value: Array

    @property
    def count(self) -> int:
        return int(self.query.shape[1])

    def all(self) -> tuple[Array, Array, Array]:
        return self.query, self.key, self.value

    def cut(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        return self.query[:, start:stop], self.key[:, start:stop], self.value[:, start:stop]


def make_rows(
    spec: SparseAttentionSpec, count: int, *, batch: int = 1, size: int = SIZE, seed: int = 0
) -> Rows:
    """Random rows whose scores have a standard deviation of about 2."""
    rng = np.random.default_rng(seed)

    def draw(heads: int, gain: float) -> Array:
        return np.asarray(gain * rng.standard_normal((batch, count, heads * size)), np.float32)

    return Rows(draw(spec.num_heads, 1.5), draw(spec.kv_num_heads, 1.4), draw(spec.kv_num_heads, 1.0))


def empty_cache(spec: SparseAttentionSpec, rows: Rows, capacity: int) -> Array:
    size = rows.query.shape[2] // spec.num_heads
    return np.zeros((len(rows.query), spec.kv_num_heads, capacity, size), np.float32)


def rounded(count: int, spec: SparseAttentionSpec) -> int:
    """A capacity: whole blocks."""
    return -(-count // spec.block_size) * spec.block_size


def feed(
    op: Op, spec: SparseAttentionSpec, rows: Rows, chunks: Sequence[int], *, grow: bool = False
) -> Array:
    """Outputs (B, T, Hq * D) of the rows given chunk by chunk.

    Args:
        grow: the cache is exactly as long as what was fed, instead of a buffer for all rows.
    """
    assert sum(chunks) == rows.count
    capacity = 0 if grow else rounded(rows.count, spec)
    keys = values = empty_cache(spec, rows, capacity)
    outputs, start = [], 0
    for size in chunks:
        past = np.full(len(rows.query), start, np.int64)
        output, keys, values = op(*rows.cut(start, start + size), keys, values, past)
        outputs.append(np.array(output))
        start += size
    return np.concatenate(outputs, 1)


@dataclass(frozen=True)
class Expected:
    """What the reference says about some rows.

    Attributes:
        output: the formula in float64.
        tolerance: twice what the same formula loses in float32, and at least 2e-6.
        compared: (B, T), false where a selection hangs on a gap above 0 and below 1e-6.
        trace: of the float32 reference.
    """

    output: Array
    tolerance: float
    compared: Array
    trace: Trace

    def check(self, got: Array, record: Callable[[str, object], None]) -> None:
        """Compare an implementation's output, and record how many rows were left out."""
        record("near_ties_excluded", int((~self.compared).sum()))
        record("exact_ties_included", sum(gap == 0 for gap in self.trace.gaps.values()))
        error = np.abs(got - self.output).max(-1)[self.compared]
        record("max_abs_error", float(error.max()))
        assert error.max() <= self.tolerance, f"{error.max():.2e} > {self.tolerance:.2e}"
        assert self.compared.mean() > 0.9


def expect(spec: SparseAttentionSpec, rows: Rows) -> Expected:
    """Run the reference over all rows at once, in float32 and in float64."""
    trace = Trace()
    cache_ = empty_cache(spec, rows, rounded(rows.count, spec))
    past = np.zeros(len(rows.query), np.int64)
    inputs = (rows.query, rows.key, rows.value, cache_, cache_)
    single, *_ = reference.sparse_attention(*inputs, past, spec=spec, trace=trace)
    double, *_ = in_float64(*(array.astype(np.float64) for array in inputs), past, spec=spec)
    compared = np.ones(single.shape[:2], bool)
    for (batch, _, position), gap in trace.gaps.items():
        if 0 < gap < NEAR_TIE:
            compared[batch, position] = False
    error = np.abs(single - double).max(-1)[compared].max()
    return Expected(double, max(2 * float(error), LEAST_TOLERANCE), compared, trace)


@cache
def expected_of_group(heads: int, kv_heads: int, coarse_lse: int, *, batch: int) -> tuple[Rows, Expected]:
    """The rows that every implementation is tested on, made once."""
    spec = small_spec(heads, kv_heads, coarse_lse=coarse_lse)
    rows = make_rows(spec, sum(CHUNKS), batch=batch, seed=heads)
    return rows, expect(spec, rows)


def in_float64(*inputs: Array, spec: SparseAttentionSpec) -> Sequence[Array]:
    """The reference with float64 in place of float32: the same lines, another precision."""
    wide = types.SimpleNamespace(**{name: getattr(np, name) for name in dir(np) if not name.startswith("_")})
    wide.float32 = np.float64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "np", wide)
        return reference.sparse_attention(*inputs, spec=spec)
