"""Blocks of GGUF files: their integers, and that they stand for the weights that ggml reads."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.quant import QuantError, Quantized
from cpm_edge.quant.gguf_blocks import unpack_q4_0, unpack_q4_1, unpack_q8_0
from tests.support.gguf_file import Blocks, store

UNPACK: dict[str, Any] = {"Q4_0": unpack_q4_0, "Q4_1 zeros": unpack_q4_1, "Q8_0": unpack_q8_0}


def weight(rows: int, cols: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def unpacked(blocks: Blocks, kind: str) -> Quantized:
    found = UNPACK[kind](blocks.rows)
    assert isinstance(found, Quantized)
    return found


@given(st.sampled_from(list(UNPACK)), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_integers_and_scales_are_those_of_the_blocks(kind: str, rows: int, count: int, seed: int) -> None:
    blocks = store(weight(rows, 32 * count, seed), kind, 0)
    q = unpacked(blocks, kind)
    assert blocks.integers is not None
    np.testing.assert_array_equal(q.codes, blocks.integers.codes)
    np.testing.assert_array_equal(q.scales, blocks.integers.scales)
    zeros = q.zero_code if q.zeros is None else q.zeros
    np.testing.assert_array_equal(np.broadcast_to(zeros, q.scales.shape), blocks.integers.zeros)


@given(st.sampled_from(["Q4_0", "Q8_0"]), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_weights_are_those_that_ggml_reads(kind: str, rows: int, count: int, seed: int) -> None:
    """Any codes, the smallest too, and scales of either sign or none at all."""
    rng = np.random.default_rng(seed)
    type_ = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[type_][1]
    packed = rng.integers(0, 256, (rows, count, size)).astype(np.uint8)
    scales = rng.choice([0.0, 0.01, -0.25, 3.0, 2.0**-24], (rows, count, 1)).astype(np.float16)
    packed[:, :, :2] = scales.view(np.uint8)
    packed = packed.reshape(rows, -1)
    q = UNPACK[kind](packed)
    np.testing.assert_array_equal(q.dequantize(), gguf.quants.dequantize(packed, type_))
    assert (q.scales != 0).all()


def test_minima_that_no_zero_point_expresses() -> None:
    packed = gguf.quants.quantize(weight(3, 64, 0), gguf.GGMLQuantizationType.Q4_1)
    assert unpack_q4_1(packed) is None
    empty = np.zeros((2, 20), np.uint8)
    q = unpack_q4_1(empty)
    assert q is not None and not q.dequantize().any() and (q.scales > 0).all()
    # A constant block has d = 0 and a minimum: no code times 0 gives it.
    empty[1, 2:4] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    assert unpack_q4_1(empty) is None


@pytest.mark.parametrize("kind", UNPACK)
def test_damage(kind: str) -> None:
    packed = store(weight(4, 64, 0), kind, 0).rows
    packed[2, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    with pytest.raises(QuantError, match="row 2 holds NaN or infinity"):
        UNPACK[kind](packed)
    with pytest.raises(QuantError, match="rows of blocks"):
        UNPACK[kind](packed[:, 1:])
