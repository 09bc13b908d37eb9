from __future__ import annotations

from cpm_edge.benchmarks.agreement import Greedy, rounding_verdict, verdict

REFERENCE = Greedy([5, 6, 7, 8], [3.0, 0.004, 0.2, 1.0], [1, 2, 3, 4])


def test_the_same_tokens_hold() -> None:
    assert verdict(REFERENCE, Greedy([5, 6, 7, 8], [])) == ("the same 4 tokens", True)


def test_a_difference_holds_at_a_tie_only() -> None:
    assert verdict(REFERENCE, Greedy([5, 2, 7, 8], [])) == (
        "differs at token 1: eager top-2 margin 0.0040",
        True,
    )
    assert verdict(REFERENCE, Greedy([5, 6, 3, 8], []))[1] is False


def test_a_runtime_that_stops_early_does_not_hold() -> None:
    assert verdict(REFERENCE, Greedy([5, 6], [])) == ("only 2 tokens, all the same", False)


def test_rounding_explains_a_difference_at_a_margin_that_it_moves_elsewhere() -> None:
    moved = Greedy([5, 6, 3, 8], [3.1, 0.05, -0.1, 0.7], [1, 2, 3, 4])
    text, holds = rounding_verdict(REFERENCE, moved)
    assert holds and "token 2, 3 of 4 the same" in text and "margin 0.20" in text and "up to 0.30" in text


def test_rounding_does_not_explain_a_wide_margin() -> None:
    assert rounding_verdict(REFERENCE, Greedy([9, 6, 7, 8], [-2.0, 0.0, 0.1, 0.9]))[1] is False
    assert rounding_verdict(REFERENCE, Greedy([9, 9, 9, 9], [-2.0, -1.0, -1.0, -1.0]))[1] is False


def test_rounding_without_a_difference_holds() -> None:
    assert rounding_verdict(REFERENCE, Greedy([5, 6, 7, 8], [3.0, 0.1, 0.2, 0.9])) == (
        "the same 4 tokens; margins move by up to 0.10",
        True,
    )
