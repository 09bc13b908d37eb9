from __future__ import annotations

import re

import pytest

from cpm_edge.benchmarks.kernels.linear_attention import KERNEL_CHUNK, LinearAttentionResult
from cpm_edge.benchmarks.kernels.machine_limits import Limits
from cpm_edge.benchmarks.samples import Samples
from tests.benchmarks.tables import cells
from tests.source_tree import ROOT


def test_the_chunk_is_that_of_the_kernel() -> None:
    header = (ROOT / "plugins/csrc/kernels/linear_attention.h").read_text(encoding="utf-8")
    found = re.search(r"kLinearChunk = (\d+);", header)
    assert found is not None and int(found[1]) == KERNEL_CHUNK


@pytest.mark.parametrize("rows", [1, 48, 49, 100])
def test_operations_are_those_of_every_pair_of_causal_rows(rows: int) -> None:
    result = LinearAttentionResult(heads=3, size=8, rows=rows)
    pairs = sum(1 for i in range(rows) for j in range(i + 1) if i // KERNEL_CHUNK == j // KERNEL_CHUNK)
    # A score of a pair is a product of 8 columns, and so is what it adds to the output.
    assert result.operations == 3 * rows * 2 * 2 * 8 * 8
    assert result.operations_in_chunks == result.operations + 3 * pairs * 2 * 2 * 8


def test_the_least_time_stands_below_the_measured_ones(limits: Limits) -> None:
    result = LinearAttentionResult(heads=32, size=128, rows=512)
    result.prefill = {"ours": Samples([0.0148]), "onnxruntime": Samples([0.0686])}
    state, chunks = (samples.median for samples in result.least(limits).values())
    assert state == pytest.approx(1.0737e9 / 100e9, rel=1e-3) and chunks == pytest.approx(
        1.275e9 / 100e9, rel=1e-3
    )
    rows = cells(result.table(limits))
    assert [row[2] for row in rows] == ["14.8", "68.6", "10.7", "12.8"]
    assert rows[1][5] == "4.64" and rows[2][4] == "100%"
