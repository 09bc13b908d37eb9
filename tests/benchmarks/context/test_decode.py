from __future__ import annotations

from cpm_edge.benchmarks.context.decode import DecodeResult
from cpm_edge.benchmarks.samples import Samples
from tests.benchmarks.tables import cells


def result() -> DecodeResult:
    return DecodeResult(
        (256, 32768),
        rates={
            "sparse": {256: Samples([100, 90, 110]), 32768: Samples([60])},
            "dense": {256: Samples([80]), 32768: Samples([20])},
            "llama.cpp Q4_0, -fa 0": {256: Samples([50])},
        },
        attention={
            "sparse": {256: Samples([0.001]), 32768: Samples([0.004])},
            "dense": {256: Samples([0.001]), 32768: Samples([0.03])},
        },
    )


def test_speeds_are_compared_with_the_first_context_and_with_dense() -> None:
    first, second = cells(result().speed_table())
    assert first == ["256", "100.0 (90.0..110.0)", "100%", "80.0", "100%", "1.25", "50.0"]
    assert second == ["32768", "60.0", "60%", "20.0", "25%", "3.00", "-"]


def test_a_missing_row_leaves_its_cells_empty() -> None:
    without = result()
    del without.rates["dense"]
    assert cells(without.speed_table())[1] == ["32768", "60.0", "60%", "-", "-", "-", "-"]


def test_the_attention_part() -> None:
    assert cells(result().attention_table())[1] == ["32768", "4.00", "30.00", "7.50"]
    assert result().to_json()["attention_seconds"]["dense"] == {"256": [0.001], "32768": [0.03]}
