"""Charts as inline SVG: no script, no file beside the page, colours from its style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 84, 20, 14, 60  # room for text that a phone shows twice as large


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        points: (x, y), ascending in x.
        spread: (low, high) for each point, or nothing.
        style: classes of the style sheet: a colour ``s1`` to ``s6``, ``dashed`` or ``dotted`` with it, or
            ``roof`` or ``peer``.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    spread: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Band:
    """An area between two lines: x, low, high."""

    name: str
    points: Sequence[tuple[float, float, float]]


def number(value: float) -> str:
    """Three digits at most: ``0.42``, ``43.1``, ``420``, ``8192``."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers from 0 to at least ``high``; ``whole`` ones for counts."""
    raw = max(high, 1e-9) / count
    if whole:
        raw = max(raw, 1.0)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    steps = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(m * magnitude for m in steps if m * magnitude >= raw)
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


class _Plot:
    """Places of values; x by the logarithm where they span more than eight times."""

    def __init__(self, xs: Sequence[float], top: float, *, counts: bool = False) -> None:
        self.log = not counts and min(xs) > 0 and max(xs) / min(xs) > 8
        values = [self._place(x) for x in xs]
        spread = (max(values) - min(values)) or 1.0
        self.first, self.span = min(values) - 0.06 * spread, 1.12 * spread
        self.marks = ticks(top, whole=counts)
        self.top = self.marks[-1]

    def _place(self, x: float) -> float:
        return math.log(x) if self.log else x

    def x(self, value: float) -> float:
        return LEFT + (self._place(value) - self.first) / self.span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.top * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series], bands: Sequence[Band], x_title: str, y_title: str, summary: str
) -> str:
    """Lines over a logarithmic axis where contexts span much; ``summary`` is read to those who cannot see."""
    xs = sorted({x for each in series for x, _ in each.points})
    tops = [high for each in series for _, high in (*each.points, *each.spread)]
    tops += [high for band in bands for _, _, high in band.points]
    plot = _Plot(xs, max(tops))
    parts = [_frame(plot, y_title, x_title)]
    parts += [_x_label(plot.x(x), number(x)) for x in _apart(xs, plot)]
    for band in bands:
        edge = [(plot.x(x), plot.y(high)) for x, _, high in band.points]
        edge += [(plot.x(x), plot.y(low)) for x, low, _ in reversed(band.points)]
        points, name = _points(_widened(edge)), escape(band.name)
        parts.append(f'<polygon class="band" points="{points}"><title>{name}</title></polygon>')
    for each in series:
        parts.append(_line(each, plot))
    return _svg("".join(parts), summary)


def _widened(edge: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A band of one x as a visible box."""
    if len({x for x, _ in edge}) > 1:
        return edge
    (x, high), (_, low) = edge
    return [(x - 14, high), (x + 14, high), (x + 14, low), (x - 14, low)]


def _line(series: Series, plot: _Plot) -> str:
    places = [(plot.x(x), plot.y(y)) for x, y in series.points]
    parts = []
    for (x, _), (low, high) in zip(series.points, series.spread, strict=False):
        at = f"{plot.x(x):.1f}"
        parts.append(f'<line class="whisker {series.style}" x1="{at}" x2="{at}" '
                     f'y1="{plot.y(low):.1f}" y2="{plot.y(high):.1f}"/>')  # fmt: skip
    if len(places) > 1:
        parts.append(f'<polyline class="line {series.style}" points="{_points(places)}"/>')
    elif series.style == "roof":
        x, y = places[0]
        ends = f'x1="{x - 40:.1f}" x2="{x + 40:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="line roof" {ends}/>')
    if series.style != "roof":
        for (x, y), (context, value) in zip(places, series.points, strict=True):
            text = f"{escape(series.name)}: {number(value)} at {number(context)}"
            place = f'cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
            parts.append(f'<circle class="dot {series.style}" {place}><title>{text}</title></circle>')
    return "".join(parts)


def histogram(values: Sequence[float], x_title: str, summary: str, bins: int = 24) -> str:
    """How often; the last bin takes what is beyond the 99th percentile, so that an outlier hides nothing."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    width = (high - low) / bins or max(high, 1e-9) * 0.01
    counts = [0] * bins
    for value in ordered:
        counts[min(bins - 1, int((value - low) / width))] += 1
    plot = _Plot([low, low + width * bins], max(counts), counts=True)
    parts = [_frame(plot, "steps", x_title)]
    for index, count in enumerate(counts):
        left, right = plot.x(low + index * width), plot.x(low + (index + 1) * width)
        top = plot.y(count)
        text = f"{number(low + index * width)} to {number(low + (index + 1) * width)} ms: {count}"
        place = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(1, right - left - 1):.1f}"'
        height = f'height="{plot.y(0) - top:.1f}"'
        parts.append(f'<rect class="bar s1" {place} {height}><title>{text}</title></rect>')
    for value in (low, (low + high) / 2, low + width * bins):
        parts.append(_x_label(plot.x(value), number(value)))
    middle = ordered[len(ordered) // 2]
    parts.append(f'<line class="mark" x1="{plot.x(middle):.1f}" x2="{plot.x(middle):.1f}" y1="{TOP}" '
                 f'y2="{plot.y(0):.1f}"><title>median {number(middle)} ms</title></line>')  # fmt: skip
    return _svg("".join(parts), summary)


def stacked(bars: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], unit: str, summary: str) -> str:
    """Horizontal bars of (name, value, style) parts."""
    most = max(sum(value for _, value, _ in parts) for _, parts in bars)
    height = TOP + len(bars) * 58 + 8
    scale = (WIDTH - 2 * RIGHT) / (most or 1)
    found = []
    for row, (name, parts) in enumerate(bars):
        y, x = TOP + row * 58 + 18, float(RIGHT)
        total = sum(value for _, value, _ in parts)
        title = f"{escape(name)}: {number(total)} {unit}"
        found.append(f'<text class="label" x="{RIGHT}" y="{y - 6}">{title}</text>')
        for part, value, style in parts:
            wide = value * scale
            text = f"{escape(part)} {number(value)} {unit}"
            place = f'x="{x:.1f}" y="{y}" width="{max(0.5, wide - 1):.1f}" height="24" rx="2"'
            found.append(f'<rect class="bar {style}" {place}><title>{text}</title></rect>')
            x += wide
    return _svg("".join(found), summary, height)


def _frame(plot: _Plot, y_title: str, x_title: str) -> str:
    parts = []
    for mark in plot.marks:
        y = plot.y(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        place = f'x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f'<text class="tick" {place}>{number(mark)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    place = f'x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle"'
    parts.append(f'<text class="axis" {place}>{escape(x_title)}</text>')
    parts.append(f'<text class="axis" transform="rotate(-90)" x="{-(HEIGHT - BOTTOM) / 2:.0f}" y="20" '
                 f'text-anchor="middle">{escape(y_title)}</text>')  # fmt: skip
    return "".join(parts)


def _apart(xs: Sequence[float], plot: _Plot) -> list[float]:
    """Those whose labels do not touch."""
    found: list[float] = []
    for x in xs:
        if not found or plot.x(x) - plot.x(found[-1]) > 64:
            found.append(x)
    return found


def _x_label(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{text}</text>'


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _svg(body: str, summary: str, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(summary, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )
