from __future__ import annotations

from cpm_edge.benchmarks.samples import Samples, agree, ratio


def test_the_median_and_the_spread() -> None:
    samples = Samples([3.0, 1.0, 2.0])
    assert samples.median == 2.0
    assert samples.text() == "2.0 (1.0..3.0)"
    assert Samples([1.234]).text(2) == "1.23"
    assert Samples().text() == "-"


def test_two_runs_agree_within_their_spreads() -> None:
    run = Samples([10, 12, 11])
    assert agree(run, Samples([11.5, 10.5, 11.8])) and agree(Samples([11.5, 10.5, 11.8]), run)
    assert not agree(run, Samples([11.9, 13, 14]))  # the spreads overlap, the medians are outside
    wide = Samples([10.5, 13, 14])  # its median is outside the other's spread, which is too small
    assert agree(run, wide) and agree(wide, run)
    assert agree(run, Samples([11]))
    assert not agree(Samples([11]), Samples([12]))


def test_a_ratio_is_of_medians_and_absent_where_nothing_was_measured() -> None:
    assert ratio(Samples([10, 30, 20]), Samples([8, 8, 100])) == "2.50"
    assert ratio(Samples(), Samples([1.0])) == ratio(Samples([1.0]), Samples()) == "-"
    assert ratio(Samples([1.0]), Samples([0.0])) == "-"
