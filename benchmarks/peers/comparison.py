"""The comparison itself: alternately in one run, medians, ratios and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cpm_edge.benchmarks.peers.peer import Peer
from cpm_edge.benchmarks.samples import Samples, ratio
from cpm_edge.benchmarks.token_bytes import TokenBytes
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.probe import read_bandwidth


@dataclass
class Rates:
    """Tokens a second of one peer over the repeats."""

    prefill: Samples = field(default_factory=Samples)
    decode: dict[int, Samples] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "prefill": self.prefill.values,
            "decode": {str(context): samples.values for context, samples in self.decode.items()},
        }


@dataclass
class Comparison:
    """Rates by label, the first row being what the others are compared with.

    Attributes:
        bandwidth: bytes a second read from memory, sampled once in every repeat.
    """

    prefill_tokens: int
    new_tokens: int
    contexts: Sequence[int]
    rates: dict[str, Rates] = field(default_factory=dict)
    bandwidth: Samples = field(default_factory=Samples)

    def table(self) -> Table:
        """Medians with their spread, and how many times the first row's speed each row is."""
        columns = [f"prefill {self.prefill_tokens}, tok/s", "ratio"]
        for context in self.contexts:
            columns += [f"decode at {context}, tok/s", "ratio"]
        table = Table("", *columns, title="tokens a second, median (spread); ratio: first row / this row")
        first = next(iter(self.rates.values()))
        for label, rates in self.rates.items():
            cells = [rates.prefill.text(), ratio(first.prefill, rates.prefill)]
            for context in self.contexts:
                cells += [rates.decode[context].text(), ratio(first.decode[context], rates.decode[context])]
            table.add_row(label, *cells)
        return table

    def roofline(self, label: str, context: int, read: TokenBytes) -> dict[str, float]:
        """Bytes a token, what the bandwidth allows, and the share that was reached."""
        bandwidth = self.bandwidth.median
        speed = self.rates[label].decode[context].median
        return {
            "linear_bytes": read.linear,
            "head_bytes": read.head,
            "embedding_bytes": read.embedding,
            "cache_bytes": read.cache,
            "total_bytes": read.total,
            "bandwidth": bandwidth,
            "possible": bandwidth / read.total,
            "reached": speed,
            "share": read.share(speed, bandwidth),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "rates": {label: rates.to_json() for label, rates in self.rates.items()},
            "bandwidth": self.bandwidth.values,
        }


def compare(
    peers: Sequence[Peer], comparison: Comparison, repeat: int, threads: int, progress: Progress
) -> None:
    """Measure every peer in turn, ``repeat`` times over, into ``comparison``."""
    comparison.rates = {
        peer.label: Rates(decode={context: Samples() for context in comparison.contexts}) for peer in peers
    }
    for number in range(1, repeat + 1):
        with progress.stage(f"{number} of {repeat}: read bandwidth"):
            comparison.bandwidth.add(read_bandwidth(threads, repeat=3))
        for peer in peers:
            with progress.stage(f"{number} of {repeat}: {peer.label}, prefill"):
                comparison.rates[peer.label].prefill.add(peer.prefill(comparison.prefill_tokens))
        for context in comparison.contexts:
            for peer in peers:
                with progress.stage(f"{number} of {repeat}: {peer.label}, decode at {context}"):
                    speed = peer.decode(context, comparison.new_tokens)
                comparison.rates[peer.label].decode[context].add(speed)


def roofline_table(rows: dict[str, dict[int, dict[str, float]]]) -> Table:
    """One line for each of our rows and contexts."""
    table = Table(
        "",
        "context",
        "linear, MB",
        "head, MB",
        "cache, MB",
        "read, GB/s",
        "possible, tok/s",
        "reached, tok/s",
        "share",
        title="roofline: bytes read a token against the bandwidth measured in this run",
    )
    for label, contexts in rows.items():
        for context, row in contexts.items():
            table.add_row(
                label,
                str(context),
                f"{row['linear_bytes'] / 1e6:.1f}",
                f"{row['head_bytes'] / 1e6:.1f}",
                f"{row['cache_bytes'] / 1e6:.1f}",
                f"{row['bandwidth'] / 1e9:.1f}",
                f"{row['possible']:.1f}",
                f"{row['reached']:.1f}",
                f"{row['share']:.0%}",
            )
    return table
