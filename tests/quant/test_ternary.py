from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import (
    TERNARY_GROUPS,
    QuantError,
    Scheme,
    WeightFormat,
    find_ternary,
    is_ternary,
    pack_ternary,
    quantize,
    quantize_ternary,
    to_bf16_bits,
    unpack_ternary,
)
from cpm_edge.quant.floats import from_bf16_bits

from .strategies import Floats

TERNARY = WeightFormat.TERNARY
EMPTY_GROUP = 2.0**-14


def bf16(values: npt.NDArray[Any]) -> Floats:
    return from_bf16_bits(to_bf16_bits(values.astype(np.float32)))


def floats(rows: list[list[float]]) -> Floats:
    return np.array(rows, np.float32)


def ternary(rows: int, cols: int, group: int, seed: int, wide: bool = False) -> tuple[Floats, Floats, Any]:
    """A matrix, its scales (rows, groups) and its signs (rows, cols)."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.01, 0.1, (rows, cols // group)).astype(np.float32)
    scales = scales if wide else bf16(scales)
    signs = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
    signs[:, ::group] = 1  # no empty group, and neighbours that differ
    return np.repeat(scales, group, 1) * signs, scales, signs


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(rows, cols, group, seed): a group of the row or of one of the sizes that are tried."""
    group = draw(st.sampled_from(TERNARY_GROUPS))
    cols = group * draw(st.integers(1, 6))
    group = draw(st.sampled_from([group, cols]))
    return draw(st.integers(1, 9)), cols, group, draw(st.integers(0, 2**32 - 1))


@given(cases())
def test_codes_scales_and_groups_are_those_of_the_weights(case: tuple[int, int, int, int]) -> None:
    rows, cols, group, seed = case
    weight, scales, signs = ternary(rows, cols, group, seed)
    found = find_ternary(weight)
    # Two neighbours with one scale look like one group, and are one.
    assert found.width >= group and found.width % group == 0 and found.half
    q = quantize(weight, Scheme(TERNARY, group))
    np.testing.assert_array_equal(q.codes.astype(np.int8) - 1, signs)
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(q.dequantize(), weight)
    np.testing.assert_array_equal(quantize(weight, Scheme(TERNARY, found.width)).dequantize(), weight)


@given(cases())
def test_the_largest_group_is_found(case: tuple[int, int, int, int]) -> None:
    rows, cols, group, seed = case
    weight, _, _ = ternary(rows, cols, group, seed)
    # Scales that rise from group to group leave no larger one.
    weight *= np.repeat(2.0 ** np.arange(cols // group, dtype=np.float32), group)
    assert find_ternary(weight).width == group
    # Ternary in some group is ternary in every part of it.
    for size in TERNARY_GROUPS:
        if group % size == 0:
            np.testing.assert_array_equal(quantize_ternary(weight, size).dequantize(), weight)


@given(cases(), st.floats(0.2, 4.0).filter(lambda factor: abs(factor - 1) > 0.02))
def test_a_fourth_value_is_named(case: tuple[int, int, int, int], factor: float) -> None:
    rows, cols, group, seed = case
    weight, _, _ = ternary(rows, cols, group, seed)
    rng = np.random.default_rng(seed)
    row, part = int(rng.integers(rows)), int(rng.integers(cols // 32))
    weight[row, 32 * part : 32 * part + 2] = np.abs(weight).max() * np.array([1, factor], np.float32)
    with pytest.raises(QuantError, match="hold the magnitudes") as caught:
        find_ternary(weight)
    assert caught.value.row == row
    assert f"columns {32 * part} to {32 * part + 31}" in caught.value.message
    with pytest.raises(QuantError, match=f"row {row} is not ternary"):
        quantize_ternary(weight, group)


def test_what_a_refusal_says() -> None:
    weight = np.zeros((3, 64), np.float32)
    weight[2, 32:39] = [0.5, -0.5, 0.25, -0.75, 1, 2, 4]
    with pytest.raises(QuantError) as caught:
        find_ternary(weight)
    assert caught.value.message == (
        "row 2 is not ternary: columns 32 to 63 hold the magnitudes 0.25, 0.5, 0.75, 1 and 2 more, "
        "expected one beside zero"
    )
    assert caught.value.hint is not None and "int4" in caught.value.hint


def test_a_neighbour_in_the_last_bit_is_another_magnitude() -> None:
    weight = np.full((1, 32), 0.03, np.float32)
    assert find_ternary(weight).width == 32
    weight[0, 7] = np.nextafter(np.float32(0.03), np.float32(1))
    with pytest.raises(QuantError, match=r"0\.0299999993, 0\.0300000012"):
        find_ternary(weight)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    weight, _, _ = ternary(4, 64, 32, 0)
    weight[3, 40] = bad
    for function in (find_ternary, quantize_ternary):
        with pytest.raises(QuantError, match="row 3 holds NaN or infinity"):
            function(weight)
    # Every weight of the group, so that there is one magnitude.
    with pytest.raises(QuantError, match="row 0 holds NaN or infinity"):
        find_ternary(np.full((1, 32), bad, np.float32))


def test_zeros() -> None:
    weight, scales, _ = ternary(2, 96, 32, 3)
    weight[0, 32:64] = 0
    weight[1] = -0.0
    q = quantize_ternary(weight, 32)
    np.testing.assert_array_equal(q.dequantize(), weight)
    np.testing.assert_array_equal(q.scales[0], [scales[0, 0], EMPTY_GROUP, scales[0, 2]])
    assert (q.codes[1] == 1).all() and (q.scales[1] == EMPTY_GROUP).all()
    # Zeros fit into any group, so they do not split one.
    weight[0, 64:] = np.sign(weight[0, 64:]) * scales[0, 0]
    assert find_ternary(weight).width == 96


@pytest.mark.parametrize("scale", [1 / 3, 2.0**-15 * (1 + 2.0**-10), 70000.0, 1e-30])
def test_scales_beyond_float16_are_wide(scale: float) -> None:
    weight = floats([[1, -1, 0, 1] * 8]) * np.float32(scale)
    assert find_ternary(weight) == (32, False)
    with pytest.raises(QuantError, match=r"row 0 has the scale .*, which float16 does not hold"):
        quantize(weight, Scheme(TERNARY, 32))
    q = quantize(weight, Scheme(TERNARY, 32, wide_scales=True))
    np.testing.assert_array_equal(q.dequantize(), weight)
    assert q.scheme.describe() == "ternary g32 with float32 scales"
    assert q.scheme.bytes_for(1, 32) == 8 + 4


def test_the_smallest_scales_that_float16_holds() -> None:
    weight = floats([[2.0**-24, 0, 0, -(2.0**-24)]])
    assert find_ternary(weight) == (4, True)
    np.testing.assert_array_equal(quantize_ternary(weight).dequantize(), weight)


@given(cases())
def test_int4_keeps_ternary_groups(case: tuple[int, int, int, int]) -> None:
    rows, cols, group, seed = case
    weight, _, signs = ternary(rows, cols, group, seed)
    q = quantize(weight, Scheme(WeightFormat.INT4, 32))
    np.testing.assert_array_equal(q.dequantize(), weight)
    parts = signs.reshape(rows, -1, 32)
    both = np.repeat((parts < 0).any(2) & (parts > 0).any(2), 32, axis=1)
    np.testing.assert_array_equal(q.codes.astype(np.int8)[both] - 8, signs[both])


def test_int4_rounds_what_is_not_quite_ternary() -> None:
    weight = floats([[0.5, -0.5, 0.25, 0] * 8, [1 / 3, -1 / 3, 0, 0] * 8])
    q = quantize(weight, Scheme(WeightFormat.INT4, 32))
    np.testing.assert_array_equal(q.codes[:, :4], [[15, 0, 12, 8], [15, 0, 8, 8]])


def test_rows_that_vote() -> None:
    weight, _, _ = ternary(1, 128, 32, 1)
    assert is_ternary(weight[0]) is True
    assert is_ternary(np.zeros(64, np.float32)) is None
    assert is_ternary(np.random.default_rng(0).standard_normal(64).astype(np.float32)) is False
    assert is_ternary(np.full(64, np.nan, np.float32)) is False


@given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_round_trip(rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 4, (rows, 4 * count), dtype=np.uint8)
    packed = pack_ternary(codes)
    assert packed.shape == (rows, count)
    np.testing.assert_array_equal(unpack_ternary(packed), codes)


def test_the_first_column_has_the_lowest_bits() -> None:
    assert pack_ternary(np.array([[0, 1, 2, 3, 2, 0, 0, 0]], np.uint8)).tolist() == [[0b11100100, 0b10]]


def test_what_does_not_pack_is_refused() -> None:
    with pytest.raises(QuantError, match="multiple of 4 columns, got 6"):
        pack_ternary(np.zeros((2, 6), np.uint8))
    with pytest.raises(QuantError, match=r"expected 0\.\.3, got 4"):
        pack_ternary(np.full((2, 8), 4, np.uint8))
    with pytest.raises(QuantError, match="expected uint8"):
        pack_ternary(np.zeros((2, 8), np.int8))
    with pytest.raises(QuantError, match="multiple of 4 columns, got 30"):
        find_ternary(np.ones((2, 30), np.float32))
    with pytest.raises(QuantError, match="96 columns cannot be split into groups of 64"):
        quantize_ternary(np.ones((1, 96), np.float32), 64)


def test_bytes() -> None:
    assert Scheme(TERNARY, 128).bytes_for(8, 1024) == 8 * (256 + 2 * 8)
    assert Scheme(TERNARY).bytes_for(8, 1024) == 8 * (256 + 2)
    with pytest.raises(QuantError, match="ternary packs 4 columns into a byte"):
        Scheme(TERNARY).bytes_for(8, 6)
    with pytest.raises(QuantError, match="asymmetric ternary"):
        Scheme(TERNARY, symmetric=False)
    with pytest.raises(QuantError, match="int8 scales are float16"):
        Scheme(WeightFormat.INT8, wide_scales=True)
