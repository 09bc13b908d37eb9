"""The Triton kernels against numpy, and the layout they read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.plugins.matmul_nbits.launches import configurations
from cpm_edge.plugins.matmul_nbits.spans import pack_spans, span_of, unpack_codes
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from tests.support.interpreted import run_interpreted


def test_every_kernel_in_the_interpreter() -> None:
    passed = run_interpreted("tests/plugins/matmul_nbits/interpreted.py")
    assert passed == len(configurations()) + 4


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
