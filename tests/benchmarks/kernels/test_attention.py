from __future__ import annotations

import pytest

from cpm_edge.benchmarks.kernels.attention import (
    AttentionResult,
    attention_json,
    attention_tables,
    dense_of,
    operations,
)
from cpm_edge.benchmarks.kernels.machine_limits import Limits
from cpm_edge.benchmarks.samples import Samples
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.benchmarks.tables import cells

SPEC = SparseAttentionSpec(16, 2, 0.125)


def test_operations_of_one_position() -> None:
    # 16 heads, two products of 64 columns over 1001 rows, two operations each.
    assert operations(dense_of(SPEC), 64, 1000) == 16 * 2 * 2 * 64 * 1001
    assert operations(SPEC, 64, 1000) == operations(dense_of(SPEC), 64, 1000)
    # Position 32767: 96 whole blocks of 64 rows and 2047 pooled keys.
    assert operations(SPEC, 64, 32767) == 16 * 2 * 64 * (2 * 96 * 64 + 2047)


def test_the_tables_compare_with_bandwidth_and_peak(limits: Limits) -> None:
    result = AttentionResult(8192, 512, layers=24)
    result.decode = {"sparse": Samples([2e-3]), "dense": Samples([10e-3, 12e-3, 11e-3])}
    result.prefill = {"sparse": Samples([1.0]), "dense": Samples([4.0])}
    decode, prefill = attention_tables([result], SPEC, 64, limits)
    (row,) = cells(decode)
    dense_bytes = 24 * 2 * 64 * 2 * 8193 * 2
    assert row[4] == "11.00 (10.00..12.00)" and row[7] == "5.50"
    assert row[5] == f"{dense_bytes / 11e-3 / 1e9:.1f}" and row[6] == f"{dense_bytes / 11e-3 / 20e9:.0%}"
    (row,) = cells(prefill)
    # Rows 7680..8191 see 7936.5 rows on average.
    expected = 24 * 512 * 16 * 2 * 2 * 64 * 7936.5 / 4.0
    assert row[:2] == ["8192", "512"] and row[8] == "4.00"
    assert row[6] == f"{expected / 1e9:.0f}" and row[7] == f"{expected / 100e9:.0%}"
    (kept,) = attention_json([result], SPEC, 64)
    assert kept["dense"]["decode_bytes"] == dense_bytes
    assert kept["dense"]["prefill_operations"] == pytest.approx(expected * 4.0)
