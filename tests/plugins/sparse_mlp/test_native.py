"""The kernel: a single row, which reads active neurons only, gives the floats of the dense products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cpm_edge.plugins.matmul_nbits import native as nbits
from cpm_edge.plugins.matmul_nbits.reference import dequantize
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas
from cpm_edge.plugins.sparse_mlp import reference
from cpm_edge.plugins.sparse_mlp.layouts import pack_slices, pack_strips
from cpm_edge.plugins.sparse_mlp.native import SparseMlp, Sparsity, sparse_mlp
from cpm_edge.plugins.sparse_mlp.spec import SLICE_ROWS, strip_bytes
from tests.plugins.matmul_nbits.test_native import IDS, SCHEMES, Weight, storage

Floats = npt.NDArray[np.float32]
Scheme = tuple[int, int, bool]


def unit_weight(rows: int, cols: int, scheme: Scheme, seed: int) -> Weight:
    """A random matrix whose products with normal rows are about normal."""
    weight = Weight(rows, cols, *scheme, seed=seed)
    size = dequantize(weight.shape, weight.codes, weight.scales, weight.zeros).std() * cols**0.5
    weight.scales = (weight.scales / size).astype(np.float16)
    codes = storage(weight.shape.bits, weight.codes)
    weight.panels = nbits.pack(weight.shape, codes, weight.scales, weight.zeros)
    return weight


class Mlp:
    """Random weights in every form; a threshold of 1 leaves about one gate in six."""

    def __init__(
        self, hidden: int, wide: int, scheme: Scheme = (4, 32, True), threshold: float = 1.0
    ) -> None:
        self.hidden, self.wide = hidden, wide
        self.weights = [
            unit_weight(*size, scheme, seed)
            for seed, size in enumerate([(wide, hidden), (wide, hidden), (hidden, wide)])
        ]
        gate, up, down = self.weights
        self.native = SparseMlp(
            gate.shape,
            up.shape,
            down.shape,
            gate.panels,
            pack_strips(up.shape, up.codes, up.scales, up.zeros),
            pack_slices(down.shape, down.codes, down.scales, down.zeros),
            threshold,
        )

    def inputs(self, rows: int, seed: int = 3) -> tuple[Floats, Floats]:
        x, residual = np.random.default_rng(seed).standard_normal((2, rows, self.hidden)).astype(np.float32)
        return x, residual

    def run(
        self,
        x: Floats,
        residual: Floats,
        *,
        threads: int = 2,
        isa: Isa | None = None,
        count: Sparsity | None = None,
    ) -> Floats:
        with ThreadPool(threads) as pool:
            poison = np.full_like(x, np.nan)
            return sparse_mlp(
                pool, self.native, x, residual=residual, scale=0.7, isa=isa, count=count, out=poison
            )

    def expected(self, x: Floats, residual: Floats) -> npt.NDArray[np.float64]:
        block = self.weights[0].shape.activation_block
        gate, up, down = (dequantize(w.shape, w.codes, w.scales, w.zeros) for w in self.weights)
        made = reference.sparse_mlp(x, gate, up, down, self.native.threshold, block)
        return np.asarray(residual + 0.7 * made)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize(("hidden", "wide"), [(128, 256), (256, 384)])
def test_it_is_the_formula(scheme: Scheme, hidden: int, wide: int) -> None:
    mlp = Mlp(hidden, wide, scheme)
    x, residual = mlp.inputs(21)
    error = np.abs(mlp.run(x, residual) - mlp.expected(x, residual))
    # A value on a rounding boundary may get the other int8 code.
    assert np.percentile(error, 90) < 1e-5 and error.max() < 0.05


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_a_single_row_is_that_row_among_others_to_the_bit(scheme: Scheme, isa: Isa) -> None:
    mlp = Mlp(256, 384, scheme)
    x, residual = mlp.inputs(9)
    whole = mlp.run(x, residual, isa=isa)
    for row in range(9):
        part = slice(row, row + 1)
        np.testing.assert_array_equal(mlp.run(x[part], residual[part], isa=isa), whole[part])


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("rows", [1, 2, 13])
def test_every_path_and_thread_count_gives_the_same_floats(scheme: Scheme, rows: int) -> None:
    mlp = Mlp(128, 256, scheme)
    x, residual = mlp.inputs(rows)
    expected = mlp.run(x, residual, threads=1, isa=Isa.SCALAR)
    for isa in available_isas():
        for threads in (1, 2, 3, 4):
            np.testing.assert_array_equal(mlp.run(x, residual, threads=threads, isa=isa), expected)


@pytest.mark.parametrize(("hidden", "wide"), [(8, 32), (96, 64), (136, 160), (320, 32)])
@pytest.mark.parametrize("rows", [1, 3])
def test_sizes_that_fill_no_slice(hidden: int, wide: int, rows: int) -> None:
    mlp = Mlp(hidden, wide, (8, 0, True))
    x, residual = mlp.inputs(rows)
    error = np.abs(mlp.run(x, residual) - mlp.expected(x, residual))
    assert np.percentile(error, 90) < 1e-5 and error.max() < 0.1


@pytest.mark.parametrize("threshold", [-100.0, 0.0, 2.0, 100.0])
def test_from_every_gate_to_none(threshold: float) -> None:
    mlp = Mlp(128, 256, threshold=threshold)
    x, residual = mlp.inputs(6)
    whole, count = mlp.run(x, residual), Sparsity()
    for row in range(6):
        part = slice(row, row + 1)
        np.testing.assert_array_equal(mlp.run(x[part], residual[part], count=count), whole[part])
    assert count.neurons == 6 * 256
    assert count.active == {-100.0: 6 * 256, 100.0: 0}.get(threshold, count.active)
    if threshold == 100:
        np.testing.assert_array_equal(whole, residual)
        assert count.read == 0
    if threshold == -100:
        assert count.read == count.bytes == 6 * (mlp.native.up.size + mlp.native.down.size)


def test_what_is_counted_is_what_is_read() -> None:
    """Poison in every neuron that does not pass, and in the scales of groups without one, would show."""
    mlp = Mlp(256, 512, threshold=2.5)
    x, residual = mlp.inputs(1, seed=5)
    count = Sparsity()
    expected = mlp.run(x, residual, count=count)
    gates = (x @ dequantize(*_parts(mlp.weights[0])).T)[0]
    assert np.abs(gates - 2.5).min() > 0.05, "int8 activations might turn a gate"
    active = np.flatnonzero(gates > 2.5)
    assert count.active == len(active) and 0 < len(active) < 512 // 32
    groups = np.unique(active // 32)
    columns = len(active) * SLICE_ROWS // 2
    assert count.read == len(active) * strip_bytes(mlp.native.up_shape) + 2 * (
        len(groups) * SLICE_ROWS * 2 + columns
    )
    strips = mlp.native.up.reshape(512, -1)
    strips[np.setdiff1d(np.arange(512), active)] = 0x7C
    by_group = mlp.native.down.reshape(2, 16, -1)
    by_group[:, np.setdiff1d(np.arange(16), groups)] = 0x7C
    for group in groups:
        codes = by_group[:, group, 2 * SLICE_ROWS :].reshape(2, 32, -1)
        codes[:, np.setdiff1d(np.arange(32), active - 32 * group)] ^= 0xFF
        by_group[:, group, 2 * SLICE_ROWS :] = codes.reshape(2, -1)
    np.testing.assert_array_equal(mlp.run(x, residual), expected)


def _parts(w: Weight) -> tuple[NBitsShape, npt.NDArray[np.uint8], npt.NDArray[np.float16], None]:
    return w.shape, w.codes, w.scales, None


def test_several_rows_are_not_counted() -> None:
    mlp = Mlp(128, 256)
    count = Sparsity()
    mlp.run(*mlp.inputs(2), count=count)
    assert count.neurons == count.read == 0


def test_what_does_not_fit_is_refused() -> None:
    mlp = Mlp(128, 256)
    bad = SparseMlp(
        mlp.native.gate_shape,
        mlp.native.up_shape,
        NBitsShape(128, 224, 4, 32),
        mlp.native.gate,
        mlp.native.up,
        mlp.native.down,
        1.0,
    )
    with ThreadPool(1) as pool, pytest.raises(NativeError, match="do not take this shape"):
        x, residual = mlp.inputs(1)
        sparse_mlp(pool, bad, x, residual=residual)
