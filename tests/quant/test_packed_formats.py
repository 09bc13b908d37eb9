"""The layouts of GPTQ, AWQ and Marlin against packers that put one integer after the other."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import QuantError, awq_format, gptq_format
from cpm_edge.quant.awq_format import unpack_awq
from cpm_edge.quant.gptq_format import column_order, unpack_gptq, unpack_gptq_zeros
from cpm_edge.quant.marlin_format import unpack_marlin, unpermute_marlin_scales
from cpm_edge.quant.packed import Groups, check_scales, nibbles, stored_groups
from tests.support.packed import pack_awq, pack_gptq, pack_marlin, permute_marlin_scales, words

Codes = npt.NDArray[np.uint8]


@st.composite
def codes(draw: st.DrawFn, rows: int = 8, cols: int = 8) -> Codes:
    """uint8 0..15 with multiples of ``rows`` and ``cols`` as shape."""
    shape = rows * draw(st.integers(1, 5)), cols * draw(st.integers(1, 5))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 16, shape, np.uint8)


@given(codes(rows=1), st.data())
def test_gptq_codes(matrix: Codes, data: st.DataObject) -> None:
    packed = pack_gptq(matrix)
    assert packed.shape == (matrix.shape[1] // 8, len(matrix))
    np.testing.assert_array_equal(unpack_gptq(packed), matrix)
    start = data.draw(st.integers(0, len(matrix)))
    stop = data.draw(st.integers(start, len(matrix)))
    np.testing.assert_array_equal(unpack_gptq(packed[:, start:stop]), matrix[start:stop])


@given(codes(cols=1))
def test_gptq_zeros(zeros: Codes) -> None:
    np.testing.assert_array_equal(unpack_gptq_zeros(words(zeros), less_one=False), zeros)
    zeros = np.maximum(zeros, 1)
    np.testing.assert_array_equal(unpack_gptq_zeros(words(zeros - np.uint8(1)), less_one=True), zeros)


@given(codes(rows=8))
def test_our_packers_write_the_words_of_the_statement(matrix: Codes) -> None:
    np.testing.assert_array_equal(gptq_format.pack_gptq(matrix), pack_gptq(matrix))
    np.testing.assert_array_equal(awq_format.pack_awq(matrix), pack_awq(matrix))
    np.testing.assert_array_equal(gptq_format.pack_gptq_zeros(matrix, less_one=False), words(matrix))
    above = np.maximum(matrix, 1)
    np.testing.assert_array_equal(
        gptq_format.pack_gptq_zeros(above, less_one=True), words(above - np.uint8(1))
    )


def test_what_the_packers_refuse() -> None:
    with pytest.raises(QuantError, match="8 codes fill a word: expected a multiple of them, got 12"):
        gptq_format.pack_gptq(np.zeros((8, 12), np.uint8))
    with pytest.raises(QuantError, match="AWQ packs 8 rows into a word: expected a multiple of them, got 9"):
        awq_format.pack_awq(np.zeros((9, 8), np.uint8))
    zeros = np.full((8, 3), 7, np.uint8)
    zeros[5, 2] = 0
    with pytest.raises(QuantError, match="row 5 has the zero point 0 in group 2") as caught:
        gptq_format.pack_gptq_zeros(zeros, less_one=True)
    assert "gptq_v2" in (caught.value.hint or "")


def test_a_zero_point_that_readers_disagree_on() -> None:
    zeros = np.full((8, 3), 7, np.uint8)
    zeros[5, 2] = 15
    with pytest.raises(QuantError, match="row 5 stores the zero point 15 in group 2") as caught:
        unpack_gptq_zeros(words(zeros), less_one=True)
    assert "gptq_v2" in (caught.value.hint or "")
    assert unpack_gptq_zeros(words(zeros), less_one=False)[5, 2] == 15


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_sorted_columns_have_their_groups_side_by_side(groups: int, width: int, seed: int) -> None:
    ordered = np.repeat(np.arange(groups, dtype=np.int32), width)
    assert column_order(ordered, groups) is None
    g_idx = np.random.default_rng(seed).permutation(ordered)
    order = column_order(g_idx, groups)
    if order is None:
        np.testing.assert_array_equal(g_idx, ordered)
    else:
        np.testing.assert_array_equal(g_idx[order], ordered)
        assert all((np.diff(part) > 0).all() for part in order.reshape(groups, width))


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        ([0, 0, 1, 2], r"expected groups within \[0, 2\), got 2 for column 3"),
        ([0, -1, 1, 1], r"expected groups within \[0, 2\), got -1 for column 1"),
        ([0, 0, 0, 1], "group 0 has 3 of 4 columns in 2 groups of one width"),
        ([1, 1, 1, 1], "group 0 has 0 of 4 columns"),
    ],
)
def test_group_indices_that_cannot_be(g_idx: list[int], message: str) -> None:
    with pytest.raises(QuantError, match=message):
        column_order(np.array(g_idx, np.int32), 2)


@given(codes(cols=1))
def test_awq_codes_and_zeros(matrix: Codes) -> None:
    packed = pack_awq(matrix)
    assert packed.shape == (matrix.shape[1], len(matrix) // 8)
    np.testing.assert_array_equal(unpack_awq(packed), matrix)
    np.testing.assert_array_equal(unpack_awq(packed[:, :1]), matrix[:8])


@given(codes(rows=64, cols=16))
def test_marlin_codes(matrix: Codes) -> None:
    packed = pack_marlin(matrix)
    assert packed.shape == (matrix.shape[1] // 16, 2 * len(matrix))
    np.testing.assert_array_equal(unpack_marlin(packed), matrix)
    np.testing.assert_array_equal(unpack_marlin(packed[:, :128]), matrix[:64])


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_marlin_scales(groups: int) -> None:
    scales = np.arange(groups * 192, dtype=np.float32).reshape(groups, 192).astype(np.float16)
    stored = permute_marlin_scales(scales)
    assert (stored != scales).any()
    np.testing.assert_array_equal(unpermute_marlin_scales(stored), scales)


def test_rows_that_marlin_does_not_have() -> None:
    with pytest.raises(QuantError, match="multiple of 64 rows, got 8"):
        unpack_marlin(np.zeros((1, 16), np.int32))
    with pytest.raises(QuantError, match="multiple of 64 rows, got 8"):
        unpermute_marlin_scales(np.zeros((2, 8), np.float16))


@pytest.mark.parametrize(
    ("cols", "count", "expected"),
    [(256, 2, (128, 1)), (256, 1, (128, 2)), (96, 3, (32, 1)), (96, 1, (32, 3)), (192, 1, (64, 3))],
)
def test_groups_are_split_to_a_size_that_bundles_have(
    cols: int, count: int, expected: tuple[int, int]
) -> None:
    assert stored_groups(cols, count) == Groups(*expected)


@pytest.mark.parametrize(("cols", "count"), [(100, 3), (64, 0), (48, 1), (64, 4)])
def test_groups_that_bundles_do_not_have(cols: int, count: int) -> None:
    with pytest.raises(QuantError, match="columns"):
        stored_groups(cols, count)


def test_scales() -> None:
    assert check_scales(np.array([[1.5, -0.25]], np.float32))
    assert not check_scales(np.array([[1.5, 1 / 3]], np.float32))
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(QuantError, match=f"row 1 has the scale {bad} in group 2"):
            check_scales(np.array([[1, 1, 1], [1, 1, bad]], np.float32))


def test_words_are_32_bits() -> None:
    with pytest.raises(QuantError, match="expected int32 with two axes, got int64"):
        nibbles(cast(Any, np.zeros((2, 2), np.int64)))
