"""Inputs for the op, its reference in two precisions, and feeding any implementation in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.reference import linear_attention
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec

Array = npt.NDArray[Any]
# query, key, value, past_state -> output, present_state
Op = Callable[..., Sequence[Array]]

STRONGEST, WEAKEST = -(2.0**-0.25), -(2.0**-8)  # of SALA's 32 heads


def make_spec(heads: int, size: int) -> LinearAttentionSpec:
    """SALA's decays for 32 heads, from the strongest to the weakest for any other number."""
    return LinearAttentionSpec(
        tuple(float(-(2.0 ** (-8 * (h + 1) / heads))) for h in range(heads)), size**-0.5
    )


@dataclass(frozen=True)
class Case:
    """Inputs and what the reference says about them.

    Attributes:
        output, state: the formula in float64.
        output_tolerance, state_tolerance: twice what the recurrence loses in float32, and at
            least 1.5e-6 of the largest value.
    """

    spec: LinearAttentionSpec
    inputs: tuple[Array, Array, Array, Array]
    output: Array
    state: Array
    output_tolerance: float
    state_tolerance: float

    def check(self, output: Array, state: Array) -> None:
        """Compare an implementation's results; NaN fails."""
        for name, got, expected, tolerance in (
            ("output", output, self.output, self.output_tolerance),
            ("state", state, self.state, self.state_tolerance),
        ):
            assert got.shape == expected.shape
            error = np.abs(got - expected).max()
            assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.2e}"

    def feed(self, op: Op, chunks: Sequence[int]) -> tuple[Array, Array]:
        """Output and last state of the rows given chunk by chunk."""
        query, key, value, state = self.inputs
        assert sum(chunks) == query.shape[1]
        outputs, start = [], 0
        for count in chunks:
            rows = slice(start, start + count)
            output, state = op(query[:, rows], key[:, rows], value[:, rows], state)
            outputs.append(output)
            start += count
        return np.concatenate(outputs, 1), state


def make_case(
    rows: int,
    heads: int,
    size: int,
    value_size: int | None = None,
    *,
    batch: int = 1,
    spec: LinearAttentionSpec | None = None,
    seed: int = 0,
) -> Case:
    """Normal inputs, past state included."""
    rng = np.random.default_rng(seed)
    value_size = value_size or size
    spec = spec or make_spec(heads, size)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    query, key = draw(batch, rows, heads * size), draw(batch, rows, heads * size)
    inputs = (query, key, draw(batch, rows, heads * value_size), draw(batch, heads, size, value_size))
    output, state = linear_attention(*(array.astype(np.float64) for array in inputs), spec=spec)
    single, single_state = linear_attention(*inputs, spec=spec)

    def tolerance(got: Array, expected: Array) -> float:
        # numpy adds the products of one row in pairs; others in turn, up to 128 of them.
        return float(max(2 * np.abs(got - expected).max(), 1.5e-6 * np.abs(expected).max()))

    return Case(spec, inputs, output, state, tolerance(single, output), tolerance(single_state, state))
