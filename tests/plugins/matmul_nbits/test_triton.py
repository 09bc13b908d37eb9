"""The Triton kernels against numpy, and the layout they read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.plugins.launch_plan import distinct
from cpm_edge.plugins.matmul_nbits.launches import configurations, matmul_plan
from cpm_edge.plugins.matmul_nbits.spans import GROUPS, pack_spans, span_of, unpack_codes
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from tests.support.interpreted import run_interpreted


def test_every_kernel_in_the_interpreter() -> None:
    assert run_interpreted("tests/plugins/matmul_nbits/interpreted.py") == 37


def test_the_shipped_configurations_are_those_of_plans() -> None:
    shapes = [NBitsShape(64, 256, bits, group) for bits in (2, 4) for group in GROUPS]
    shapes += [NBitsShape(64, 256, 4, group, symmetric=False) for group in GROUPS]
    plans = [matmul_plan(shape) for shape in (*shapes, NBitsShape(64, 256, 8, 0))]
    assert distinct(plans) == sorted(configurations(), key=lambda each: each.name)


@pytest.mark.parametrize(
    ("rows", "name", "grid"),
    [
        *[(1, "nbits_int8_8x16", (5, 1, 1)), (8, "nbits_int8_8x16", (5, 1, 1))],
        *[(9, "nbits_int8_16x64", (2, 1, 1)), (32, "nbits_int8_16x64", (4, 1, 1))],
        *[(33, "nbits_int8_64x64", (2, 1, 1)), (512, "nbits_int8_64x64", (16, 1, 1))],
    ],
)
def test_kernels_by_the_number_of_rows(rows: int, name: str, grid: tuple[int, int, int]) -> None:
    launch = matmul_plan(NBitsShape(77, 48, 8, 0)).variant(rows).launches[0]
    assert (launch.kernel.name, launch.grid(rows)) == (name, grid)


@pytest.mark.parametrize(("cols", "bytes_a_row"), [(192, 48), (96, 32)])
def test_rows_of_codes_are_whole_spans(cols: int, bytes_a_row: int) -> None:
    shape = NBitsShape(3, cols, 2, 32)
    packed = pack_spans(shape, np.ones((3, cols), np.uint8), np.ones((3, shape.groups), np.float16), None)
    launch = matmul_plan(shape).variant(1).launches[0]
    assert launch.arguments["row_bytes"] == packed.codes.shape[1] == bytes_a_row


def test_bytes_lie_as_they_are() -> None:
    codes = np.arange(96, dtype=np.uint8).reshape(2, 48)
    shape = NBitsShape(2, 48, 8, 0)
    packed = pack_spans(shape, codes, np.array([[1], [2]], np.float16), None)
    assert packed.codes.tolist() == codes.tolist() == unpack_codes(shape, packed.codes).tolist()
    assert packed.scales.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (NBitsShape(2, 40, 8, 0), "columns: expected a multiple of 16 with 8 bits, got 40"),
        (NBitsShape(2, 64, 8, 32), "group: expected 0, one scale a row, with 8 bits, got 32"),
        (NBitsShape(2, 256, 4, 256), "group: expected one of 32, 64, 128, got 256"),
        (NBitsShape(2, 64, 4, 0), "group: expected one of 32, 64, 128, got 0"),
    ],
)
def test_shapes_without_a_kernel_are_refused(shape: NBitsShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul_plan(shape)
    with pytest.raises(ValueError, match=message):
        pack_spans(shape, np.zeros((2, shape.cols), np.uint8), np.ones((2, 1), np.float16), None)


@given(st.sampled_from([2, 4]), st.sampled_from([32, 64, 128]), st.integers(1, 9), st.integers(1, 5))
def test_unpacking_gives_the_codes(bits: int, group: int, rows: int, groups: int) -> None:
    shape = NBitsShape(rows, group * groups, bits, group)
    codes = np.random.default_rng(rows).integers(0, 1 << bits, (rows, shape.cols), np.uint8)
    packed = pack_spans(shape, codes, np.ones((rows, groups), np.float16), None)
    assert np.array_equal(unpack_codes(shape, packed.codes), codes)


def test_bytes_of_a_span() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    packed = pack_spans(NBitsShape(1, 32, 4, 32), codes, np.ones((1, 1), np.float16), None)
    assert packed.codes[0].tolist() == [code | code << 4 for code in range(16)]
    codes = np.repeat(np.array([0, 1, 2, 1], np.uint8), 16)[None]
    packed = pack_spans(NBitsShape(1, 64, 2, 64), codes, np.ones((1, 1), np.float16), None)
    assert packed.codes[0].tolist() == [0 | 1 << 2 | 2 << 4 | 1 << 6] * 16


def test_the_rest_of_a_span_counts_nothing() -> None:
    codes = np.full((1, 32), 2, np.uint8)
    packed = pack_spans(NBitsShape(1, 32, 2, 32), codes, np.ones((1, 1), np.float16), None)
    assert packed.codes[0].tolist() == [2 | 2 << 2 | 1 << 4 | 1 << 6] * 16
    assert packed.scales[:, 0].tolist() == [1, 0]


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 0), (2, 256)])
def test_formats_without_a_kernel_are_refused(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match=r"bits: expected 2 or 4|group: expected one of"):
        span_of(bits, group)


def test_zeros_must_fit_the_format() -> None:
    shape = NBitsShape(1, 32, 4, 32, symmetric=False)
    with pytest.raises(ValueError, match="zeros: expected some"):
        pack_spans(shape, np.zeros((1, 32), np.uint8), np.ones((1, 1), np.float16), None)
