"""The Triton kernels in the interpreter; ``test_triton.py`` runs this in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpm_edge.plugins.kernel_config import KernelConfig
from cpm_edge.plugins.matmul_nbits.launches import configurations
from cpm_edge.plugins.matmul_nbits.reference import dequantize
from cpm_edge.plugins.matmul_nbits.spans import pack_spans
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from tests.support.interpreter import launch

ROWS = 77  # of the weight: no multiple of a tile


def check(config: KernelConfig, groups: int, m: int) -> None:
    bits, group = config.constants["BITS"], config.constants["GROUP"]
    assert bits is not None and group is not None
    symmetric = "zeros" in config.constants
    shape = NBitsShape(ROWS, group * groups, bits, group, symmetric)
    rng = np.random.default_rng(m)
    codes = rng.integers(0, 3 if bits == 2 else 16, (ROWS, shape.cols), np.uint8)
    scales = rng.uniform(0.5, 1.5, (ROWS, groups)).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, 16, scales.shape).astype(np.uint8)
    packed = pack_spans(shape, codes, scales, zeros)
    x = rng.standard_normal((m, shape.cols)).astype(np.float16)
    y = torch.full((m, ROWS), torch.nan, dtype=torch.float16)
    arguments = {"x": x, "codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
    tensors = {name: torch.from_numpy(each) for name, each in arguments.items() if each is not None}
    launch(config, **tensors, y=y, m=m, n=ROWS, k=shape.cols, row_bytes=packed.codes.shape[1])
    weight = dequantize(shape, codes, scales, zeros).astype(np.float64)
    expected = x.astype(np.float64) @ weight.T
    # Half a unit of float16 for the result; float32 rounds each of the products and of their sums.
    products = np.abs(x.astype(np.float64)) @ np.abs(weight).T
    bound = 2.0**-11 * np.abs(expected) + shape.cols * 2.0**-24 * products + 2.0**-24
    assert (np.abs(y.numpy() - expected) <= bound).all()


@pytest.mark.parametrize("config", configurations(), ids=lambda each: each.name)
def test_a_kernel_gives_the_product(config: KernelConfig) -> None:
    check(config, 3, 1 if "gemv" in config.name else 19)


@pytest.mark.parametrize("config", configurations()[:3], ids=lambda each: each.name)
def test_columns_beyond_a_tile_and_more_than_one_row(config: KernelConfig) -> None:
    check(config, 33, 3)


def test_a_row_of_zeros_and_the_largest_codes() -> None:
    config = configurations()[0]
    shape = NBitsShape(ROWS, 64, 4, 32)
    packed = pack_spans(shape, np.full((ROWS, 64), 15, np.uint8), np.ones((ROWS, 2), np.float16), None)
    x = torch.zeros((2, 64), dtype=torch.float16)
    x[1] = 1
    y = torch.full((2, ROWS), torch.nan, dtype=torch.float16)
    codes, scales = torch.from_numpy(packed.codes), torch.from_numpy(packed.scales)
    launch(config, x=x, codes=codes, scales=scales, y=y, m=2, n=ROWS, k=64, row_bytes=32)
    assert (y[0] == 0).all() and (y[1] == 64 * 7).all()
