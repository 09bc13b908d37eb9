"""The fused step of a recurrent layer, and the output gate, against numpy in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from cpm_edge.plugins.linear_attention.recurrent import RecurrentNorms, gate_output, recurrent_attention
from cpm_edge.plugins.linear_attention.reference import linear_attention
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from tests.plugins.linear_attention.cases import make_spec

Array = npt.NDArray[Any]
EPSILON = 1e-3  # large enough to be missed
ISAS = pytest.mark.parametrize("isa", available_isas(), ids=lambda isa: isa.name)


@dataclass(frozen=True)
class Inputs:
    """One layer's step of ``rows`` rows, and what it gives in float64."""

    norms: RecurrentNorms
    mixed: Array
    rotation: tuple[Array, Array]
    state: Array
    output: Array
    next_state: Array


def make_inputs(rows: int, heads: int, size: int) -> Inputs:
    rng = np.random.default_rng(rows)
    width = heads * size
    scales = [1 + 0.3 * rng.standard_normal(n).astype(np.float32) for n in (size, size, width)]
    mixed = rng.standard_normal((rows, 4 * width)).astype(np.float32)
    angle = rng.uniform(0, 6, (rows, size // 2))
    rotation = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    state = rng.standard_normal((heads, size, size)).astype(np.float32)

    q, k, v, gate = np.split(mixed.astype(np.float64), 4, axis=1)
    cos, sin = (table[:, None].astype(np.float64) for table in rotation)

    def turned(x: Array, scale: Array) -> Array:
        first, second = np.split(rms(x.reshape(rows, heads, size), scale), 2, axis=-1)
        joined = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return joined.reshape(1, rows, width)

    past = state[None].astype(np.float64)
    spec = make_spec(heads, size)
    output, next_state = linear_attention(
        turned(q, scales[0]), turned(k, scales[1]), v[None], past, spec=spec
    )
    expected = rms(output[0], scales[2]) / (1 + np.exp(-gate))
    return Inputs(
        RecurrentNorms(scales[0], scales[1], scales[2], EPSILON),
        mixed,
        rotation,
        state,
        expected,
        next_state[0],
    )


def rms(x: Array, scale: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale)


@ISAS
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 24), (4, 16), (32, 64), (2, 128)])
@pytest.mark.parametrize("rows", [1, 3, 4, 50])
def test_one_step_of_any_length(isa: Isa, heads: int, size: int, rows: int) -> None:
    case = make_inputs(rows, heads, size)
    for threads in (1, 3):
        state, out = case.state.copy(), np.full((rows, heads * size), np.nan, np.float32)
        with ThreadPool(threads) as pool:
            spec = make_spec(heads, size)
            recurrent_attention(pool, spec, case.norms, case.mixed, case.rotation, state, isa=isa, out=out)
        np.testing.assert_allclose(out, case.output, atol=2e-4)
        np.testing.assert_allclose(state, case.next_state, atol=2e-4)


@ISAS
def test_chunks_and_single_rows_are_the_whole(isa: Isa) -> None:
    case, spec = make_inputs(60, 4, 16), make_spec(4, 16)
    state, outputs = case.state.copy(), []
    with ThreadPool(2) as pool:
        for start, stop in ((0, 1), (1, 5), (5, 58), (58, 60)):
            rows = slice(start, stop)
            rotation = case.rotation[0][rows], case.rotation[1][rows]
            mixed = case.mixed[rows]
            outputs.append(recurrent_attention(pool, spec, case.norms, mixed, rotation, state, isa=isa))
    np.testing.assert_allclose(np.concatenate(outputs), case.output, atol=2e-4)
    np.testing.assert_allclose(state, case.next_state, atol=2e-4)


def test_no_rows_leave_the_state_alone() -> None:
    case, spec = make_inputs(3, 2, 8), make_spec(2, 8)
    state = case.state.copy()
    with ThreadPool(1) as pool:
        nothing = tuple(table[:0] for table in case.rotation)
        out = recurrent_attention(pool, spec, case.norms, case.mixed[:0], nothing, state)  # type: ignore[arg-type]
    assert out.shape == (0, 16)
    np.testing.assert_array_equal(state, case.state)


def test_what_does_not_fit_is_refused() -> None:
    case, spec = make_inputs(3, 2, 8), make_spec(2, 8)
    with ThreadPool(1) as pool:
        for mixed, state, message in (
            (case.mixed[:, 1:], case.state, r"mixed: expected \(3, 64\), got \(3, 63\)"),
            (case.mixed, cast(Any, case.state.astype(np.float64)), "expected a C-contiguous float32 array"),
            (case.mixed, case.state[:1], r"mixed: expected \(3, 32\)"),
        ):
            with pytest.raises(NativeError, match=message):
                recurrent_attention(pool, spec, case.norms, mixed, case.rotation, state)
        three, six = np.ones(3, np.float32), np.ones(6, np.float32)
        odd = RecurrentNorms(three, three, six, EPSILON)
        with pytest.raises(NativeError, match="do not take this shape"):
            tables = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
            empty = np.zeros((2, 3, 3), np.float32)
            recurrent_attention(pool, spec, odd, np.zeros((1, 24), np.float32), tables, empty)


@ISAS
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 7), (3, 8), (9, 33)])
def test_the_output_gate(isa: Isa, rows: int, width: int) -> None:
    """From gates far below 0, where e^x is infinite, to far above; gates are columns of a wider matrix."""
    rng = np.random.default_rng(width)
    wide = rng.standard_normal((rows, width + 5)).astype(np.float32) * 40
    wide[0, 2] = -300
    values = rng.standard_normal((rows, width)).astype(np.float32)
    gate = wide[:, 2 : 2 + width]
    with np.errstate(over="ignore"):
        expected = values / (1 + np.exp(-gate.astype(np.float64)))
    with ThreadPool(2) as pool:
        gate_output(pool, gate, values, isa=isa)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-30)


def test_a_gate_of_another_shape_is_refused() -> None:
    with ThreadPool(1) as pool, pytest.raises(NativeError, match=r"gate: expected float32 rows \(2, 3\)"):
        gate_output(pool, np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32))
