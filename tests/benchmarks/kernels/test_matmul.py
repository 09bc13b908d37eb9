from __future__ import annotations

import numpy as np
import pytest

from cpm_edge.benchmarks.kernels import matmul
from cpm_edge.benchmarks.kernels.machine_limits import Limits
from cpm_edge.benchmarks.kernels.matmul import (
    HEAD,
    LINEAR,
    Format,
    MatmulResult,
    matmul_table,
    matrices,
    measure_matmul,
)
from cpm_edge.benchmarks.samples import Samples
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.matmul_nbits import native
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import ThreadPool
from tests.benchmarks.shapes import TINY
from tests.benchmarks.tables import cells


def test_the_products_of_the_real_shape() -> None:
    assert matrices(Shape.open("minicpm4-0.5b").parsed()) == {
        "q, k and v": (1280, 1024),
        "o": (1024, 1024),
        "gate or up": (4096, 1024),
        "down": (1024, 4096),
        "head": (73448, 1024),
    }


def test_rates_and_shares(limits: Limits) -> None:
    shape = NBitsShape(1000, 1920, 4, 32)
    result = MatmulResult("o", shape, Format(4, 32), bytes=1_000_000, rows=10, error=0.0055)
    result.seconds, result.rows_seconds = Samples([1e-4, 2e-4, 1e-4]), Samples([1e-3])
    assert result.bandwidth == pytest.approx(10e9) and result.multiply_adds == pytest.approx(19.2e9)
    (row,) = cells(matmul_table([result], limits))
    assert row[:5] == ["o", "1000 x 1920", "int4 g32", "1.00", "10.0 (5.0..10.0)"]
    assert row[5:] == ["50%", "19.2", "38%", "0.55%"]


def test_every_matrix_in_every_format(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "WALK_BYTES", 1 << 16)
    config = Shape("tiny", TINY).parsed()
    found = measure_matmul(config, limits, rows=9, repeat=2, progress=Progress(enabled=False))
    assert len(found) == 4 * len(LINEAR) + len(HEAD)
    assert {each.format.label for each in found if each.matrix == "o"} >= {"int4 g32 asym", "ternary g128"}
    for each in found:
        assert len(each.seconds) == len(each.rows_seconds) == 2 and each.bandwidth > 0
        # int8 activations in blocks of 32 normal numbers: their rounding alone is half a percent.
        assert 1e-3 < each.error < 1e-2, each
    # 128 x 128 in int4 g32: half a byte a weight and two bytes for 32 of them.
    size = next(each.bytes for each in found if (each.matrix, each.format) == ("o", Format(4, 32)))
    assert size == 128 * 128 * 18 // 32


def test_a_format_whose_group_does_not_divide_the_columns_is_left_out(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "WALK_BYTES", 1 << 16)
    config = Shape("tiny", {**TINY, "hidden_size": 96, "head_dim": 32}).parsed()
    found = measure_matmul(config, limits, rows=1, repeat=1, progress=Progress(enabled=False))
    by_matrix = {name: [e.format.label for e in found if e.matrix == name] for name in matrices(config)}
    assert by_matrix["q, k and v"] == ["int4 g32", "int4 g32 asym", "int8 row"]
    assert len(by_matrix["o"]) == len(by_matrix["down"]) == len(LINEAR)


def test_a_prepared_product_may_run_again() -> None:
    shape = NBitsShape(24, 64, 4, 32)
    panels, weight = matmul.random_panels(shape)
    x = np.random.default_rng(3).standard_normal((3, 64), np.float32)
    residual = np.ones((3, 24), np.float32)
    with ThreadPool(2) as pool:
        expected = native.matmul(pool, shape, panels, x, residual=residual, scale=0.5)
        call = native.MatmulCall(pool, shape, panels, x, residual=residual, scale=0.5)
        for _ in range(2):
            call.output[:] = np.nan
            call()
            np.testing.assert_array_equal(call.output, expected)
    np.testing.assert_allclose(expected, 1 + 0.5 * (x @ weight.T), atol=0.5)
