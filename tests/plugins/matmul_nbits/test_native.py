from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.plugins.matmul_nbits import native, reference
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import Isa, NativeError, ThreadPool, available_isas

SCHEMES = [
    (4, 32, True),
    (4, 64, True),
    (4, 128, False),
    (4, 32, False),
    (2, 128, True),
    (8, 0, True),
    (8, 32, True),
]
IDS = [f"bits{bits}-g{group}-{'sym' if symmetric else 'asym'}" for bits, group, symmetric in SCHEMES]


def storage(bits: int, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Codes (rows, cols) packed along the columns, lowest bits first."""
    per_byte = 8 // bits
    packed = np.zeros((len(codes), -(-codes.shape[1] // per_byte)), np.uint8)
    for i in range(per_byte):
        part = codes[:, i::per_byte]
        packed[:, : part.shape[1]] |= part << np.uint8(bits * i)
    return packed


class Weight:
    """A random matrix in every form."""

    def __init__(self, rows: int, cols: int, bits: int, group: int, symmetric: bool, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape = NBitsShape(rows, cols, bits, group, symmetric)
        top = 3 if bits == 2 else 1 << bits
        self.codes = rng.integers(1 if bits == 8 else 0, top, (rows, cols)).astype(np.uint8)
        self.scales = (rng.standard_normal((rows, self.shape.groups)) * 0.02).astype(np.float16)
        self.zeros = None if symmetric else rng.integers(0, 16, (rows, self.shape.groups)).astype(np.uint8)
        self.panels = native.pack(self.shape, storage(bits, self.codes), self.scales, self.zeros)

    def expected(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return reference.matmul(self.shape, self.codes, self.scales, self.zeros, x)


def sizes(group: int) -> st.SearchStrategy[tuple[int, int]]:
    cols = st.integers(1, 4).map(lambda n: n * group) if group else st.integers(1, 150)
    return st.tuples(st.integers(1, 40), cols)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_panels_equal_the_reference(scheme: tuple[int, int, bool], data: st.DataObject) -> None:
    bits, group, symmetric = scheme
    rows, cols = data.draw(sizes(group))
    weight = Weight(rows, cols, bits, group, symmetric, seed=rows)
    expected = reference.pack(weight.shape, weight.codes, weight.scales, weight.zeros)
    np.testing.assert_array_equal(weight.panels, expected.ravel())


def test_flip_takes_two_s_complement() -> None:
    weight = Weight(9, 64, 4, 32, True)
    flipped = storage(4, weight.codes) ^ np.uint8(0x88)
    np.testing.assert_array_equal(
        native.pack(weight.shape, flipped, weight.scales, None, flip=8), weight.panels
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 67])
def test_every_path_and_thread_count_gives_the_same_floats(scheme: tuple[int, int, bool], m: int) -> None:
    bits, group, symmetric = scheme
    weight = Weight(37, 3 * (group or 35), bits, group, symmetric)
    x = np.random.default_rng(m).standard_normal((m, weight.shape.cols)).astype(np.float32)
    expected = weight.expected(x)
    results = []
    for isa in available_isas():
        for threads in (1, 2, 3, 4):
            with ThreadPool(threads) as pool:
                out = np.full((m, weight.shape.rows), np.nan, np.float32)
                results.append(native.matmul(pool, weight.shape, weight.panels, x, isa=isa, out=out))
    # Float32 sums of exact integer blocks: a few roundings of the running total, whatever the length.
    error = np.abs(results[0] - expected).max()
    assert error <= 2e-6 * np.abs(expected).max() + 1e-7
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("isa", [isa for isa in Isa if isa in available_isas()], ids=lambda isa: isa.name)
def test_extreme_activations(isa: Isa) -> None:
    weight = Weight(16, 128, 4, 32, True)
    x = np.zeros((5, 128), np.float32)
    x[1] = 1e30
    x[2, ::2] = -127.0
    x[3, 40] = 1e-38  # too small: counts as zero
    x[4] = np.where(np.arange(128) % 2, 1.0, -1.0)
    with ThreadPool(2) as pool:
        got = native.matmul(pool, weight.shape, weight.panels, x, isa=isa)
    expected = weight.expected(x)
    assert np.all(got[0] == 0)
    assert np.all(np.abs(got - expected) <= 2e-6 * np.abs(expected).max(1, keepdims=True))


def test_the_largest_sums_do_not_overflow() -> None:
    shape = NBitsShape(8, 4096, 4, 32)
    codes = np.full((8, 4096), 15, np.uint8)
    scales = np.ones((8, 128), np.float16)
    panels = native.pack(shape, storage(4, codes), scales, None)
    x = np.full((1, 4096), 127.0, np.float32)
    with ThreadPool(1) as pool:
        for isa in available_isas():
            np.testing.assert_array_equal(native.matmul(pool, shape, panels, x, isa=isa), 7.0 * 127 * 4096)


@pytest.mark.parametrize("isa", available_isas(), ids=lambda isa: isa.name)
def test_residual_and_gate(isa: Isa) -> None:
    weight, up = Weight(40, 96, 4, 32, True, seed=1), Weight(40, 96, 4, 32, True, seed=2)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 96)).astype(np.float32) * 4
    residual = rng.standard_normal((6, 40)).astype(np.float32)
    with ThreadPool(2) as pool:
        added = native.matmul(pool, weight.shape, weight.panels, x, residual=residual, scale=0.25, isa=isa)
        gated = native.gated(pool, weight.shape, weight.panels, up.panels, x, isa=isa)
    product = weight.expected(x)
    np.testing.assert_allclose(added, residual + 0.25 * product, atol=3e-6)
    np.testing.assert_allclose(gated, product / (1 + np.exp(-product)) * up.expected(x), rtol=3e-6, atol=3e-6)


def test_refusals() -> None:
    weight = Weight(8, 64, 4, 32, True)
    with ThreadPool(1) as pool:
        missing = [isa for isa in Isa if isa not in available_isas()]
        for isa in missing:
            with pytest.raises(NativeError, match="lacks the instruction set"):
                native.matmul(pool, weight.shape, weight.panels, np.zeros((1, 64), np.float32), isa=isa)
        wrong: Any = np.zeros((1, 64), np.float64)
        with pytest.raises(NativeError, match="float32"):
            native.matmul(pool, weight.shape, weight.panels, wrong)
    with pytest.raises(NativeError, match="closed"):
        native.matmul(pool, weight.shape, weight.panels, np.zeros((1, 64), np.float32))
    with pytest.raises(ValueError, match="expected 2, 4 or 8"):
        NBitsShape(8, 64, 3, 32)
    with pytest.raises(ValueError, match="multiple of 32 that divides"):
        NBitsShape(8, 96, 4, 64)
