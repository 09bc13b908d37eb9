from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.plugins.matmul_nbits.native import c_shape
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import library
from cpm_edge.plugins.sparse_mlp import reference
from cpm_edge.plugins.sparse_mlp.layouts import pack_slices, pack_strips
from cpm_edge.plugins.sparse_mlp.spec import slice_bytes, slice_count, strip_bytes
from tests.plugins.matmul_nbits.test_native import IDS, SCHEMES, Weight

Scheme = tuple[int, int, bool]
for_schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)


def weight(data: st.DataObject, scheme: Scheme) -> Weight:
    group = scheme[1]
    cols = data.draw(st.integers(1, 3).map(lambda n: n * group) if group else st.integers(1, 90))
    rows = data.draw(st.integers(1, 40) | st.sampled_from([64, 127, 128, 129, 200]))
    return Weight(rows, cols, *scheme, seed=rows)


@for_schemes
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_they_are_the_reference_s(scheme: Scheme, data: st.DataObject) -> None:
    w = weight(data, scheme)
    made = (w.shape, w.codes, w.scales, w.zeros)
    np.testing.assert_array_equal(pack_strips(*made), reference.strips(*made))
    np.testing.assert_array_equal(pack_slices(*made), reference.slices(*made))


@for_schemes
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_they_take_as_many_bytes_as_the_kernels_expect(scheme: Scheme, data: st.DataObject) -> None:
    w = weight(data, scheme)
    made = (w.shape, w.codes, w.scales, w.zeros)
    assert pack_strips(*made).shape == (w.shape.rows, strip_bytes(w.shape))
    assert pack_slices(*made).shape == (slice_count(w.shape), slice_bytes(w.shape))
    for name, size in (
        ("cpm_strips_bytes", w.shape.rows * strip_bytes(w.shape)),
        ("cpm_slices_bytes", slice_count(w.shape) * slice_bytes(w.shape)),
    ):
        function = getattr(library(), name)
        function.restype = ctypes.c_int64
        assert function(ctypes.byref(c_shape(w.shape))) == size


def test_strips_take_what_panels_do() -> None:
    shape = NBitsShape(3840, 1536, 4, 32)
    assert shape.rows * strip_bytes(shape) == shape.panels * shape.groups * (16 + 8 * 32 // 2)


@for_schemes
def test_blocks_of_rows_concatenate(scheme: Scheme) -> None:
    w = Weight(300, 128, *scheme)
    made = pack_strips(w.shape, w.codes, w.scales, w.zeros), pack_slices(w.shape, w.codes, w.scales, w.zeros)
    for pack, whole, cuts in (
        (pack_strips, made[0], (0, 7, 130, 300)),
        (pack_slices, made[1], (0, 128, 256, 300)),
    ):
        parts = []
        for first, last in pairwise(cuts):
            rows = slice(first, last)
            shape = NBitsShape(last - first, 128, *scheme)
            zeros = None if w.zeros is None else w.zeros[rows]
            parts.append(pack(shape, w.codes[rows], w.scales[rows], zeros))
        np.testing.assert_array_equal(np.concatenate(parts), whole)
