"""Outcomes as Markdown, to be put into a document."""

from __future__ import annotations

from collections.abc import Sequence

from cpm_edge.benchmarks.gpu_check.card import Card
from cpm_edge.benchmarks.gpu_check.case import Outcome

COLUMNS = (
    *("op", "rows", "error", "us", "GB/s", "of peak", "TFLOP/s", "of peak"),
    *("beside", "its us", "ours is faster by"),
)


def markdown(card: Card, outcomes: Sequence[Outcome], versions: str) -> str:
    """The card, then a table; errors are shares of what rounding explains."""
    limits = [_rate(card.bandwidth, 1e9, "GB/s from memory"), _rate(card.tensor, 1e12, "TFLOP/s of float16")]
    known = ", ".join(each for each in limits if each) or "its limits are not known"
    lines = [
        f"{card.name} (sm_{card.sm}): {known}; {versions}.",
        "",
        _line(COLUMNS),
        _line(["---"] + ["---:"] * 7 + ["---", "---:", "---:"]),
        *(_row(card, each) for each in outcomes),
    ]
    return "\n".join(lines) + "\n"


def _row(card: Card, each: Outcome) -> str:
    error = f"{each.error:.2f}" if each.is_right else f"WRONG: {each.error:.2f}"
    cells = [f"{each.op}: {each.name}", str(each.rows), error]
    if each.seconds is None or each.peer_seconds is None:
        return _line([*cells, *["-"] * 5, each.peer, "-", "-"])
    moved, done = each.bytes / each.seconds, each.operations / each.seconds
    cells += [f"{1e6 * each.seconds:.1f}", f"{moved / 1e9:.1f}", _share(moved, card.bandwidth)]
    cells += [f"{done / 1e12:.2f}", _share(done, card.tensor), each.peer]
    ratio = each.peer_seconds / each.seconds
    return _line([*cells, f"{1e6 * each.peer_seconds:.1f}", f"{ratio:.2f}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rate(value: float | None, unit: float, name: str) -> str:
    return "" if value is None else f"{value / unit:.0f} {name}"


def _share(value: float, limit: float | None) -> str:
    return "-" if limit is None else f"{value / limit:.0%}"
