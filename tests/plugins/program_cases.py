"""Programs of the native library and what the single kernels give for the same arrays."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.recurrent import CRecurrentRows
from cpm_edge.plugins.native import ThreadPool, best_isa, check, library, pointer
from cpm_edge.plugins.program import RESULT, Norm, Program, Values
from cpm_edge.plugins.session import NativeSession
from cpm_edge.plugins.sparse_attention.native_latent import CLatentRows, CLatentSpec
from tests.plugins.linear_attention.cases import make_spec
from tests.plugins.linear_attention.test_native_recurrent import make_inputs
from tests.plugins.matmul_nbits.test_native import Weight
from tests.plugins.sparse_attention.test_native_latent import Case as LatentCase

Floats = npt.NDArray[np.float32]
Scheme = tuple[int, int, bool]


class Board:
    """A program of one op and the array that it works on: NaN wherever the test puts nothing.

    Args:
        threads: of its session.
        to_result: the op's output is the program's result, and not a value.

    Attributes:
        session: has two layers, without caches and states.
        program: the op is to be added to it.
        values: where the test and the op have their places.
    """

    def __init__(self, threads: int, to_result: bool) -> None:
        self.session = NativeSession(threads, layers=2)
        self.program = Program()
        self.values = Values()
        self._to_result = to_result
        self._inputs: list[tuple[int, Floats]] = []

    def put(self, row: Floats) -> int:
        """The offset of an input."""
        offset = self.values.fresh(row.size)
        self._inputs.append((offset, row.reshape(-1)))
        return offset

    def y(self, floats: int) -> int:
        """The offset of the output."""
        self._y, self._floats = RESULT if self._to_result else self.values.take(floats), floats
        return self._y

    def run(self, past_length: int = 0) -> Floats:
        """The output, after checking that the op wrote nothing else."""
        values, result = self.values.array(), np.zeros(self._floats + 16, np.float32)
        values[:], result[:] = np.nan, np.nan
        for offset, row in self._inputs:
            values[offset : offset + row.size] = row
        before = values.copy()
        self.program.run(self.session, past_length, values, result)
        first, place = (0, result) if self._to_result else (self._y, values)
        output = place[first : first + self._floats].copy()
        place[first : first + self._floats] = np.nan
        np.testing.assert_array_equal(values, before)
        assert np.isnan(result).all()
        return output


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_norm(board: Board, x: Floats) -> Norm:
    return Norm(board.put(x), 1 + 0.3 * normal(x.size, seed=9), 1e-3, 0.6)


def normalized(pool: ThreadPool, norm: Norm, x: Floats) -> Floats:
    """(1, n) of x (n,)."""
    y = np.full((1, x.size), np.nan, np.float32)
    scalars = ctypes.c_int64(1), ctypes.c_int64(x.size), ctypes.c_float(norm.epsilon)
    status = library().cpm_rms_norm(
        pool.handle, ctypes.c_int32(best_isa()), pointer(x, np.float32), pointer(norm.weight, np.float32),
        *scalars, ctypes.c_float(norm.factor), pointer(y, np.float32),
    )  # fmt: skip
    check(status, "cpm_rms_norm")
    return y


def weights(scheme: Scheme, count: int) -> list[Weight]:
    return [Weight(37, 3 * (scheme[1] or 35), *scheme, seed=seed) for seed in range(count)]


def rotations(size: int) -> tuple[Floats, Floats]:
    angle = np.random.default_rng(size).uniform(0, 6, size // 2).astype(np.float32)
    return np.cos(angle), np.sin(angle)


def recurrent_constants(heads: int, size: int) -> tuple[CRecurrentRows, Any]:
    """What is the same in every step, and the arrays behind it."""
    norms, spec = make_inputs(1, heads, size).norms, make_spec(heads, size)
    decay = np.asarray(spec.decay, np.float32)
    arrays = {"query_norm": norms.query, "key_norm": norms.key, "output_norm": norms.output, "decay": decay}
    addresses = {name: pointer(array, np.float32) for name, array in arrays.items()}
    rows = CRecurrentRows(heads=heads, size=size, scale=spec.scale, epsilon=norms.epsilon, **addresses)
    return rows, arrays


def latent_constants(case: LatentCase) -> tuple[CLatentSpec, CLatentRows]:
    sizes, up = case.sizes, case.up
    described = (sizes.num_heads, sizes.rank, sizes.nope_size, sizes.rope_size, sizes.value_size)
    spec = CLatentSpec(*described, up.scales.shape[1], sizes.scale, sizes.epsilon)
    norm, scales = pointer(case.norm, np.float32), pointer(up.scales, np.float32)
    return spec, CLatentRows(norm=norm, scales=scales, codes=pointer(up.codes, np.int8))
