from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.plugins.matmul_nbits import panels, reference
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from tests.plugins.matmul_nbits.test_native import IDS, SCHEMES, Weight, sizes


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_fast_packer_equals_the_reference(scheme: tuple[int, int, bool], data: st.DataObject) -> None:
    bits, group, symmetric = scheme
    rows, cols = data.draw(sizes(group))
    weight = Weight(rows, cols, bits, group, symmetric, seed=cols)
    expected = reference.pack(weight.shape, weight.codes, weight.scales, weight.zeros)
    got = panels.pack_rows(weight.shape, weight.codes, weight.scales, weight.zeros)
    np.testing.assert_array_equal(got, expected)


def test_blocks_of_whole_panels_concatenate() -> None:
    weight = Weight(37, 96, 4, 32, False)
    parts = []
    for start in range(0, 37, 16):
        rows = slice(start, min(start + 16, 37))
        shape = NBitsShape(rows.stop - rows.start, 96, 4, 32, False)
        assert weight.zeros is not None
        parts.append(panels.pack_rows(shape, weight.codes[rows], weight.scales[rows], weight.zeros[rows]))
    whole = panels.pack_rows(weight.shape, weight.codes, weight.scales, weight.zeros)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
