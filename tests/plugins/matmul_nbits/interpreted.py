"""The Triton kernels in the interpreter; ``test_triton.py`` runs this in a process of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpm_edge.plugins.matmul_nbits.launches import matmul_plan
from cpm_edge.plugins.matmul_nbits.reference import dequantize
from cpm_edge.plugins.matmul_nbits.spans import GROUPS, pack_spans
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from tests.support.interpreter import run_plan

ROWS = 77  # of the weight: no multiple of a tile
FORMATS = [(8, 0, True), *((bits, group, True) for bits in (4, 2) for group in GROUPS)]
FORMATS += [(4, group, False) for group in GROUPS]
# Rows of x for each kernel: one row a program, small tiles with a rest, large ones.
SOME_ROWS = (3, 19, 70)


def check(bits: int, group: int, symmetric: bool, groups: int, m: int) -> None:
    shape = NBitsShape(ROWS, (group or 48) * groups, bits, group, symmetric)
    rng = np.random.default_rng(m)
    codes = rng.integers(0, 3 if bits == 2 else 1 << bits, (ROWS, shape.cols), np.uint8)
    scales = rng.uniform(0.5, 1.5, (ROWS, shape.groups)).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, 16, scales.shape).astype(np.uint8)
    x = rng.standard_normal((m, shape.cols)).astype(np.float16)
    y = run(shape, codes, scales, zeros, x)
    weight = dequantize(shape, codes, scales, zeros).astype(np.float64)
    expected = x.astype(np.float64) @ weight.T
    # Half a unit of float16 for the result; float32 rounds each of the products and of their sums.
    products = np.abs(x.astype(np.float64)) @ np.abs(weight).T
    bound = 2.0**-11 * np.abs(expected) + shape.cols * 2.0**-24 * products + 2.0**-24
    assert (np.abs(y - expected) <= bound).all()


def run(
    shape: NBitsShape,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
    zeros: npt.NDArray[np.uint8] | None,
    x: npt.NDArray[np.float16],
) -> npt.NDArray[np.float16]:
    packed = pack_spans(shape, codes, scales, zeros)
    # TensorRT has bytes as int8.
    weight = [packed.codes.view(np.int8), packed.scales]
    weight += [] if packed.zeros is None else [packed.zeros.view(np.int8)]
    y = torch.full((1, len(x), shape.rows), torch.nan, dtype=torch.float16)
    tensors = [torch.from_numpy(each) for each in (x[None], *weight)]
    run_plan(matmul_plan(shape), tensors, [y])
    return y[0].numpy()


@pytest.mark.parametrize("m", SOME_ROWS)
@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS, ids=str)
def test_the_plan_gives_the_product(bits: int, group: int, symmetric: bool, m: int) -> None:
    check(bits, group, symmetric, 3, m)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS[:4], ids=str)
def test_columns_beyond_a_tile(bits: int, group: int, symmetric: bool) -> None:
    check(bits, group, symmetric, 544 // (group or 48) + 1, 1)


@pytest.mark.parametrize(("bits", "group", "total"), [(4, 32, 7), (8, 0, 127), (2, 64, 1)])
def test_a_row_of_zeros_and_the_largest_codes(bits: int, group: int, total: int) -> None:
    shape = NBitsShape(ROWS, 64, bits, group)
    codes = np.full((ROWS, 64), shape.zero + total, np.uint8)
    x = np.array([[0], [1]], np.float16).repeat(64, 1)
    y = run(shape, codes, np.ones((ROWS, shape.groups), np.float16), None, x)
    assert (y[0] == 0).all() and (y[1] == 64 * total).all()
