"""The Triton kernels in the interpreter; ``test_triton.py`` runs this in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cpm_edge.benchmarks.gpu_check.linear_attention import TF32, Inputs, draw, error
from cpm_edge.plugins.linear_attention.launches import linear_attention_plan
from cpm_edge.plugins.linear_attention.reference import linear_attention
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from tests.plugins.linear_attention.cases import Array, make_spec
from tests.support.interpreter import run_plan


def run(
    spec: LinearAttentionSpec, inputs: Inputs, chunks: Sequence[int] | None = None, *, in_place: bool = True
) -> tuple[Array, Array]:
    """Output and last state of the kernels, the rows given in chunks."""
    query, key, value, past = inputs
    _, heads, size, value_size = past.shape
    plan = linear_attention_plan(spec, size, value_size)
    decay = torch.tensor(spec.decay, dtype=torch.float32)
    state, start, outputs = torch.from_numpy(past.copy()), 0, []
    for count in chunks or [query.shape[1]]:
        rows = [torch.from_numpy(each[:, start : start + count].copy()) for each in (query, key, value)]
        output = torch.full((1, count, heads * value_size), torch.nan)
        present = state if in_place else torch.full_like(state, torch.nan)
        run_plan(plan, [*rows, state, decay], [output, present])
        outputs.append(output.numpy())
        state, start = present, start + count
    return np.concatenate(outputs, 1), state.numpy()


def check(spec: LinearAttentionSpec, inputs: Inputs, got: tuple[Array, Array], chunks: int) -> None:
    assert [each.dtype for each in got] == [np.float32, np.float32]
    assert error(spec, inputs, got, chunks) <= 1


SHAPES = [
    *[(1, 2, 128, 128), (1, 3, 24, 24), (1, 1, 80, 48), (2, 2, 128, 128), (83, 2, 128, 128)],
    *[(32, 1, 64, 64), (64, 2, 16, 16), (33, 3, 24, 24), (45, 1, 80, 48), (7, 1, 96, 128)],
]


@pytest.mark.parametrize(("rows", "heads", "size", "value_size"), SHAPES)
def test_the_plan_gives_the_recurrence(rows: int, heads: int, size: int, value_size: int) -> None:
    spec = make_spec(heads, size)
    inputs = draw(rows, heads, size, value_size)
    check(spec, inputs, run(spec, inputs), -(-rows // 32))


@pytest.mark.parametrize("chunks", [[1] * 40, [33, 7], [1, 38, 1], [20, 20]], ids=str)
def test_the_result_does_not_depend_on_the_chunks(chunks: list[int]) -> None:
    spec = make_spec(2, 32)
    inputs = draw(40, 2, 32, 32)
    check(spec, inputs, run(spec, inputs, chunks), len(chunks) + 1)


def test_decode_after_prefill_is_prefill() -> None:
    """Row 40 alone after 39 rows, against the same row in one call: the state is the same to 20 bits."""
    spec = make_spec(2, 64)
    inputs = draw(40, 2, 64, 64)
    together, apart = run(spec, inputs), run(spec, inputs, [39, 1])
    largest = np.abs(together[1]).max()
    assert np.abs(together[1] - apart[1]).max() <= 2.0**-20 * largest
    assert np.abs(together[0] - apart[0]).max() <= TF32 * np.abs(together[0]).max()


@pytest.mark.parametrize("decay", [0.0, -1e-3, -1e4])
def test_extreme_decays(decay: float) -> None:
    spec = LinearAttentionSpec((decay, -0.5), 0.25)
    inputs = draw(70, 2, 16, 16)
    check(spec, inputs, run(spec, inputs), 3)


def test_values_beyond_float16_where_they_are_float32() -> None:
    """Scores and states above 65504, and keys of which the low parts are subnormal."""
    spec = make_spec(2, 32)
    query, key, value, past = draw(40, 2, 32, 32)
    large = np.float16(300)
    loud: Inputs = (query * large, key * large, value, past * 1e6)
    check(spec, loud, run(spec, loud), 2)
    quiet: Inputs = (query, key * np.float16(1e-4), value, 0 * past)
    check(spec, quiet, run(spec, quiet), 2)


def test_rounding_does_not_shrink_the_output() -> None:
    """All terms positive: operands cut off to tf32 would make every output about 2^-12 smaller, twice."""
    spec = make_spec(2, 64)
    inputs = tuple(np.abs(each) for each in draw(96, 2, 64, 64))
    expected = linear_attention(*(each.astype(np.float64) for each in inputs), spec=spec)[0]
    ratio = run(spec, inputs)[0] / expected  # type: ignore[arg-type]
    assert abs(ratio.mean() - 1) < 2.0**-14


@pytest.mark.parametrize("rows", [1, 40])
def test_out_of_place(rows: int) -> None:
    spec = make_spec(2, 32)
    inputs = draw(rows, 2, 32, 32)
    for a, b in zip(run(spec, inputs), run(spec, inputs, in_place=False), strict=True):
        np.testing.assert_array_equal(a, b)
