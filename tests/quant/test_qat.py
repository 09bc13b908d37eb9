from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import QuantError, Scheme, WeightFormat
from cpm_edge.quant.qat import BITS_OF, Grid, find_grid, on_grid, quantize_grid

Floats = npt.NDArray[np.float32]
TYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def rounded(values: npt.NDArray[Any], kind: Any) -> Floats:
    return np.asarray(values, np.float32).astype(kind).astype(np.float32)


def fake_quantized(
    rows: int, cols: int, group: int, seed: int, *, steps: int, scale_type: Any, kind: str
) -> tuple[Floats, npt.NDArray[np.int8], Floats]:
    """Weights as training leaves them, codes -8..7, and scales: max / steps, in ``scale_type``."""
    rng = np.random.default_rng(seed)
    source = rng.standard_normal((rows, cols // group, group)).astype(np.float32) * np.float32(0.02)
    scales = rounded(np.abs(source).max(axis=2) / steps, scale_type)
    codes = np.clip(np.rint(source / scales[:, :, None]), -8, 7)
    weight = rounded(codes * scales[:, :, None], TYPES[kind]).reshape(rows, cols)
    return weight, codes.astype(np.int8).reshape(rows, cols), scales


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    group = draw(st.sampled_from([32, 64, 128]))
    return {
        "rows": draw(st.integers(1, 4)),
        "cols": group * draw(st.integers(1, 4)),
        "group": group,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "steps": draw(st.sampled_from([7, 8])),
        "scale_type": draw(st.sampled_from(list(TYPES.values()))),
        "kind": draw(st.sampled_from(list(TYPES))),
    }


@given(cases())
def test_weights_of_training_come_back_bit_by_bit(case: dict[str, Any]) -> None:
    weight, codes, scales = fake_quantized(**case)
    bits, kind = BITS_OF[case["kind"]], TYPES[case["kind"]]
    found = find_grid(weight, bits)
    assert found.width % case["group"] == 0
    q = quantize_grid(weight, found.width, bits, wide_scales=not found.half)
    assert q.scheme == Scheme(WeightFormat.INT4, found.width, wide_scales=not found.half)
    np.testing.assert_array_equal(rounded(q.dequantize(), kind), weight)
    # The codes are those of training up to a factor that all of a group share, and then so are the scales.
    q = quantize_grid(weight, case["group"], bits, wide_scales=True)
    own = q.codes.astype(np.int8) - 8
    ratio = np.abs(own).reshape(*scales.shape, -1).max(axis=2) / np.abs(codes).reshape(*scales.shape, -1).max(
        axis=2
    )
    np.testing.assert_allclose(np.abs(q.scales) * ratio, scales, rtol=2.0 ** (1 - min(bits, 22)))


@given(cases())
def test_the_scales_of_training_are_found_when_they_have_few_bits(case: dict[str, Any]) -> None:
    """With a code of 1, 2, 4 or 8 in the group only one bfloat16 fits."""
    case |= {"scale_type": ml_dtypes.bfloat16, "steps": 7}
    weight, codes, scales = fake_quantized(**case)
    q = quantize_grid(weight, case["group"], BITS_OF[case["kind"]])
    sure = np.isin(np.abs(codes), (1, 2, 4)).reshape(*scales.shape, -1).any(axis=2)
    sure &= np.abs(codes).reshape(*scales.shape, -1).max(axis=2) == 7
    np.testing.assert_array_equal(q.scales[sure], scales[sure])
    same = np.repeat(sure, case["group"], axis=1)
    np.testing.assert_array_equal(q.codes[same].astype(np.int8) - 8, codes[same])


def test_learned_scales_need_not_reach_the_ends() -> None:
    codes = np.tile(np.array([-3, 0, 2, 5, -5, 1, 3, 4], np.float32), 8).reshape(1, 64)
    weight = rounded(codes * np.float32(0.0123), ml_dtypes.bfloat16)
    assert find_grid(weight, 8).width == 64
    q = quantize_grid(weight, 64, 8, wide_scales=True)
    np.testing.assert_array_equal(q.codes.astype(np.float32) - 8, codes)


def test_the_largest_weight_may_be_at_minus_8() -> None:
    """scale = max / 8 as llama.cpp has it: a positive maximum gets a negative scale."""
    codes = np.arange(-8, 8, dtype=np.float32).repeat(2).reshape(1, 32)
    for scale in (0.25, -0.25):
        q = quantize_grid(codes * np.float32(scale), 32, 8)
        np.testing.assert_array_equal(q.codes.astype(np.float32) - 8, codes)
        assert q.scales[0, 0] == scale


def test_zeros() -> None:
    zeros = np.zeros((2, 64), np.float32)
    assert find_grid(zeros, 8) == Grid(64, True)
    q = quantize_grid(zeros, 64, 8)
    assert (q.codes == 8).all() and (q.scales == 2.0**-14).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(TYPES)))
def test_ordinary_weights_are_on_no_grid(seed: int, kind: str) -> None:
    weight = np.random.default_rng(seed).standard_normal((3, 64)).astype(np.float32)
    weight = rounded(weight, TYPES[kind])
    rows = on_grid(weight, BITS_OF[kind])
    assert rows is not None and not rows.any()
    with pytest.raises(QuantError, match="row 0 is not on a grid of int4: columns 0 to 31"):
        find_grid(weight, BITS_OF[kind])


def test_one_weight_off_the_grid_is_named() -> None:
    weight, _, _ = fake_quantized(4, 128, 64, seed=3, steps=7, scale_type=np.float32, kind="BF16")
    rows = on_grid(weight, 8)
    assert rows is not None and rows.all()
    # The next bfloat16: one step of the last bit.
    column = 64 + int(np.abs(weight[2, 64:96]).argmax())
    weight[2, column] *= 1 + 2.0**-7
    weight = rounded(weight, ml_dtypes.bfloat16)
    with pytest.raises(QuantError, match="row 2 is not on a grid of int4: columns 64 to 95") as caught:
        find_grid(weight, 8)
    assert "--weight-format int4" in (caught.value.hint or "")
    with pytest.raises(QuantError, match=r"row 2 .* columns 64 to 127"):
        quantize_grid(weight, 64, 8, wide_scales=True)
    rows = on_grid(weight, 8)
    assert rows is not None and rows.tolist() == [True, True, False, True]


def test_scales_that_float16_does_not_hold() -> None:
    weight = np.arange(-8, 8, dtype=np.float32).repeat(2).reshape(1, 32) * np.float32(1 / 3)
    assert find_grid(weight, 24) == Grid(32, False)
    with pytest.raises(QuantError, match=r"row 0 has the scale .*, which float16 does not hold"):
        quantize_grid(weight, 32, 24)
    np.testing.assert_array_equal(quantize_grid(weight, 32, 24, wide_scales=True).dequantize(), weight)


def test_bad_input() -> None:
    with pytest.raises(QuantError, match="48 columns are divided by no group size"):
        find_grid(np.zeros((1, 48), np.float32), 8)
    assert on_grid(np.zeros((1, 48), np.float32), 8) is None
    broken = np.zeros((3, 32), np.float32)
    broken[1, 4] = np.nan
    with pytest.raises(QuantError, match="row 1 holds NaN"):
        find_grid(broken, 8)
    assert on_grid(broken, 8) is None


def test_powers_of_two_have_narrower_steps_below() -> None:
    """The scale must lie where all products round to their weights: near 2^n that is not the middle."""
    rng = np.random.default_rng(0)
    scales = (
        2.0 ** rng.integers(-6, -1, 4000)
        * (1 + rng.uniform(-1, 1, 4000) * 2.0**-8)
        / rng.integers(1, 8, 4000)
    )
    codes = rng.integers(-7, 8, (4000, 32))
    codes[:, 0] = 7
    weight = rounded(codes * scales.astype(np.float32)[:, None], ml_dtypes.bfloat16)
    found = find_grid(weight, 8)
    q = quantize_grid(weight, 32, 8, wide_scales=not found.half)
    np.testing.assert_array_equal(rounded(q.dequantize(), ml_dtypes.bfloat16), weight)


@given(cases())
def test_narrower_groups_never_need_wider_scales(case: dict[str, Any]) -> None:
    weight, _, _ = fake_quantized(**(case | {"group": 32}))
    weight *= np.float32(2.0**-10)  # where float16 has few bits left
    bits = BITS_OF[case["kind"]]
    weight = rounded(weight, TYPES[case["kind"]])
    try:
        found = find_grid(weight, bits)
    except QuantError:
        return  # rounded once more, small weights of float16 may leave the grid
    for size in (128, 64, 32):
        if found.width % size == 0:
            quantize_grid(weight, size, bits, wide_scales=not found.half)
