"""The values of one quantity over the repeats of a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median


class Samples:
    """Repeated values; the median is what a table shows, the extremes are its spread."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.values = list(values)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def median(self) -> float:
        return median(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def text(self, digits: int = 1) -> str:
        """``252.3 (249.1..255.0)``; without the spread when there is one value."""
        if not self.values:
            return "-"
        middle = f"{self.median:.{digits}f}"
        if len(self.values) == 1:
            return middle
        return f"{middle} ({min(self.values):.{digits}f}..{max(self.values):.{digits}f})"


def agree(one: Samples, other: Samples) -> bool:
    """Whether one of the medians lies within the other's spread, as those of two runs of the same thing do.

    To ask it of both is too much: of 78 pairs of rows from equal runs, minutes to hours apart on a machine
    whose memory changed by a third, 64 would have agreed, and all do by this.
    """
    pairs = ((one, other), (other, one))
    return any(min(a.values) <= b.median <= max(a.values) for a, b in pairs)


def ratio(ours: Samples, other: Samples) -> str:
    """Ratio of medians, ``1.25``; ``-`` where either was not measured or is zero."""
    if not len(ours) or not len(other) or not other.median:
        return "-"
    return f"{ours.median / other.median:.2f}"
