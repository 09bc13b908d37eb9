from __future__ import annotations

import pytest

from cpm_edge.benchmarks.context.prefill import Fit, PrefillResult, Span, peer_width, rate_between, spans_to
from tests.benchmarks.tables import cells


def linear(tokens: int, constant: float, slope: float) -> list[Span]:
    """Spans of a machine whose token at position n takes constant + slope * n seconds."""
    return [
        Span(first, stop, (stop - first) * (constant + slope * (first + stop) / 2))
        for first, stop in spans_to(tokens)
    ]


def test_spans_end_where_the_prompt_does() -> None:
    assert spans_to(5000) == [(0, 2048), (2048, 4096), (4096, 5000)]
    assert spans_to(100) == [(0, 100)]


def test_rates_are_of_whole_prompts() -> None:
    spans = [Span(0, 2048, 2.0), Span(2048, 4096, 6.0)]
    assert spans[1].rate == pytest.approx(2048 / 6)
    assert rate_between(spans, 0, 2048) == 1024 and rate_between(spans, 0, 4096) == 512
    assert rate_between(spans, 2048, 4096) == pytest.approx(2048 / 6)
    assert rate_between(spans, 0, 3000) is None and rate_between([], 0, 5) is None


def test_a_peer_is_measured_in_spans_enough_for_a_line() -> None:
    assert peer_width(8192) == peer_width(32768) == 2048
    assert peer_width(2048) == 512 and peer_width(300) == 512
    assert len(spans_to(4096, peer_width(4096))) == 4


def test_the_fit_finds_the_line_and_extrapolates_the_whole_prompt() -> None:
    fit = Fit.of(linear(8192, 0.002, 1e-6))
    assert fit.constant == pytest.approx(0.002) and fit.slope == pytest.approx(1e-6)
    # The mean token of 32768 is the one in the middle.
    assert fit.rate(32768) == pytest.approx(1 / (0.002 + 1e-6 * 16384))
    assert Fit.of([Span(0, 100, 1.0)]).rate(10_000) == pytest.approx(100)


def test_the_summary() -> None:
    attention = {"sparse": [Span(0, 2048, 1.0), Span(2048, 4096, 2.0)],
                 "dense": [Span(0, 2048, 1.5), Span(2048, 4096, 6.0)]}  # fmt: skip
    result = PrefillResult([Span(0, 2048, 8.0), Span(2048, 4096, 24.0)], attention, linear(2048, 0.1, 0.0))
    found = result.summary()
    assert (found["rate_short"], found["rate"], found["kept"]) == (256, 128, 0.5)
    assert (found["attention_ratio"], found["attention_ratio_at_end"]) == (2.5, 3.0)
    assert found["stock_rate"] == pytest.approx(10) and found["stock_is_extrapolated"]
    assert found["ours_over_stock"] == pytest.approx(12.8)
    rows = cells(result.table())
    assert rows[0] == ["0..2048", "256.0", "1.00", "1.50", "1.50", "10.0"]
    assert rows[1] == ["2048..4096", "85.3", "2.00", "6.00", "3.00", "-"]
    text = dict(cells(result.summary_table()))
    assert text["of the short rate"] == "50%"
    assert "extrapolated from 2048" in text["OpenVINO stock, 4096 tokens"]


def test_a_stock_rate_that_was_measured_is_not_extrapolated() -> None:
    spans = [Span(0, 1000, 4.0)]
    result = PrefillResult(spans, {"sparse": spans, "dense": spans}, [Span(0, 1000, 8.0)])
    found = result.summary()
    assert found["stock_rate"] == 125 and not found["stock_is_extrapolated"] and found["ours_over_stock"] == 2
    assert "stock_rate" not in PrefillResult(spans, {"sparse": spans, "dense": spans}).summary()


def test_a_prompt_of_one_span_has_no_rows_of_equal_numbers() -> None:
    spans = [Span(0, 1000, 4.0)]
    table = PrefillResult(spans, {"sparse": spans, "dense": spans}).summary_table()
    assert cells(table) == [
        ["end to end, 1000 tokens", "250.0 tok/s"],
        ["attention, dense / sparse, whole prompt", "1.00"],
    ]
