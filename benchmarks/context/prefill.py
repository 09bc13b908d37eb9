"""Prefill speed by position: ours end to end, the attention part, and OpenVINO's own operators."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from cpm_edge.benchmarks.context.attention import AttentionProbe
from cpm_edge.benchmarks.peers.peer import FIRST_TOKEN, PROMPT_SEED
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes.openvino.native_session import PREFILL_CHUNK
from cpm_edge.runtimes.session import Engine

SPAN = 2048


@dataclass(frozen=True)
class Span:
    """Positions [first, stop) and the seconds that their prefill took."""

    first: int
    stop: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return (self.stop - self.first) / self.seconds


@dataclass(frozen=True)
class Fit:
    """Seconds a token at position n: ``constant + slope * n``."""

    constant: float
    slope: float

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Fit:
        """Least squares over the spans' middles; a single span has no slope."""
        middles = [(span.first + span.stop) / 2 for span in spans]
        each = [1 / span.rate for span in spans]
        if len(spans) == 1:
            return cls(each[0], 0.0)
        slope, constant = np.polyfit(middles, each, 1)
        return cls(float(constant), float(slope))

    def rate(self, tokens: int) -> float:
        """Tokens a second of a whole prompt."""
        return 1 / (self.constant + self.slope * tokens / 2)


def spans_to(tokens: int, width: int = 0) -> list[tuple[int, int]]:
    """[0, tokens) in spans of ``width``, SPAN where it is 0."""
    step = width or SPAN
    return [(first, min(first + step, tokens)) for first in range(0, tokens, step)]


def rate_between(spans: Sequence[Span], first: int, stop: int) -> float | None:
    """Tokens a second over [first, stop), None where no spans cover exactly that."""
    inside = [span for span in spans if first <= span.first and span.stop <= stop]
    if not inside or (inside[0].first, inside[-1].stop) != (first, stop):
        return None
    return (stop - first) / sum(span.seconds for span in inside)


def peer_width(tokens: int) -> int:
    """Spans for a fit: at least four of them where the prompt has that many chunks."""
    return max(PREFILL_CHUNK, min(SPAN, tokens // 4 // PREFILL_CHUNK * PREFILL_CHUNK))


def measure_prefill(
    engine: Engine, spans: Sequence[tuple[int, int]], vocab_size: int, progress: Progress, what: str
) -> list[Span]:
    """Prefill a random prompt span by span, after a warm-up of one chunk."""
    prompt = np.random.default_rng(PROMPT_SEED).integers(FIRST_TOKEN, vocab_size, spans[-1][1])
    found = []
    with engine.session() as session:
        session.forward(prompt[:PREFILL_CHUNK])
        session.reset()
        for first, stop in spans:
            with progress.stage(f"prefill {first}..{stop}, {what}"):
                start = time.perf_counter()
                session.forward(prompt[first:stop])
                found.append(Span(first, stop, time.perf_counter() - start))
    return found


def measure_attention(probe: AttentionProbe, tokens: int, progress: Progress) -> dict[str, list[Span]]:
    """The attention of all layers over the same spans, sparse and dense in turn."""
    found: dict[str, list[Span]] = {"sparse": [], "dense": []}
    for first, stop in spans_to(tokens):
        for row, spans in found.items():
            with progress.stage(f"attention of prefill {first}..{stop}, {row}"):
                seconds = probe.prefill(first, stop, PREFILL_CHUNK, dense=row == "dense")
            spans.append(Span(first, stop, seconds))
    return found


@dataclass
class PrefillResult:
    """Spans from 0 to the end of the prompt.

    Attributes:
        attention: by "sparse" and "dense", seconds of all layers.
        stock: OpenVINO's own operators, as far as they were measured; empty when they were not.
    """

    ours: list[Span]
    attention: dict[str, list[Span]]
    stock: list[Span] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(
            *["positions", "ours, tok/s", "attention sparse, s", "attention dense, s", "dense / sparse"],
            "OpenVINO stock, tok/s",
            title="prefill by position",
        )
        for ours, sparse, dense in zip(self.ours, *self.attention.values(), strict=True):
            other = rate_between(self.stock, ours.first, ours.stop)
            table.add_row(
                f"{ours.first}..{ours.stop}",
                f"{ours.rate:.1f}",
                f"{sparse.seconds:.2f}",
                f"{dense.seconds:.2f}",
                f"{dense.seconds / sparse.seconds:.2f}",
                f"{other:.1f}" if other else "-",
            )
        return table

    def summary(self) -> dict[str, Any]:
        """Rates of the whole prompt and of its first span, attention ratios, and the stock rate."""
        tokens, short = self.ours[-1].stop, self.ours[0].stop
        whole, first = rate_between(self.ours, 0, tokens), rate_between(self.ours, 0, short)
        assert whole is not None and first is not None
        total = {row: sum(span.seconds for span in spans) for row, spans in self.attention.items()}
        last = {row: spans[-1].seconds for row, spans in self.attention.items()}
        found: dict[str, Any] = {
            "tokens": tokens,
            "short": short,
            "rate": whole,
            "rate_short": first,
            "kept": whole / first,
            "attention_ratio": total["dense"] / total["sparse"],
            "attention_ratio_at_end": last["dense"] / last["sparse"],
        }
        if self.stock:
            fit = Fit.of(self.stock)
            measured = rate_between(self.stock, 0, tokens)
            rate = measured or fit.rate(tokens)
            found |= {
                "stock_rate": rate,
                "stock_is_extrapolated": measured is None,
                "stock_measured_to": self.stock[-1].stop,
                "stock_fit": {"constant": fit.constant, "slope": fit.slope},
                "ours_over_stock": whole / rate,
            }
        return found

    def summary_table(self) -> Table:
        found = self.summary()
        table = Table("prefill", "value", title="prefill, summary")
        several = len(self.ours) > 1  # with one span, the short prompt and the last span are the whole
        if several:
            table.add_row(f"end to end, {found['short']} tokens", f"{found['rate_short']:.1f} tok/s")
        table.add_row(f"end to end, {found['tokens']} tokens", f"{found['rate']:.1f} tok/s")
        if several:
            table.add_row("of the short rate", f"{found['kept']:.0%}")
        table.add_row("attention, dense / sparse, whole prompt", f"{found['attention_ratio']:.2f}")
        if several:
            table.add_row("attention, dense / sparse, last span", f"{found['attention_ratio_at_end']:.2f}")
        if "stock_rate" in found:
            how = f"extrapolated from {found['stock_measured_to']} tokens: seconds a token = a + b n"
            how = how if found["stock_is_extrapolated"] else "measured"
            table.add_row(
                f"OpenVINO stock, {found['tokens']} tokens", f"{found['stock_rate']:.1f} tok/s ({how})"
            )
            table.add_row("ours / OpenVINO stock", f"{found['ours_over_stock']:.2f}")
        return table

    def to_json(self) -> dict[str, Any]:
        def plain(spans: Sequence[Span]) -> list[dict[str, float]]:
            return [vars(span) | {"rate": span.rate} for span in spans]

        return {
            "ours": plain(self.ours),
            "attention": {row: plain(spans) for row, spans in self.attention.items()},
            "stock": plain(self.stock),
            "summary": self.summary(),
        }
