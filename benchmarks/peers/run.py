"""``cpm-bench peers``: from options to a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpm_edge.benchmarks.artifacts import Artifacts
from cpm_edge.benchmarks.memory import resident_bytes
from cpm_edge.benchmarks.peers.comparison import Comparison, compare, roofline_table
from cpm_edge.benchmarks.peers.lineup import Lineup, Wanted, gather
from cpm_edge.benchmarks.report import Report
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.benchmarks.token_bytes import WeightBytes, token_bytes
from cpm_edge.exporter.progress import Progress


def run(
    shape: Shape,
    wanted: Wanted,
    *,
    contexts: Sequence[int],
    prefill: int,
    new_tokens: int,
    repeat: int,
    cache: Path | None,
) -> Report:
    """Make the models, measure every row in turn, and put the tables together."""
    shape = shape.changed(context=max(*contexts, prefill) + new_tokens + 1)
    settings = {
        "shape": shape.name,
        "config": shape.config,
        "weights": wanted.weights,
        "attention": wanted.attention,
        "threads": wanted.threads,
        "contexts": list(contexts),
        "prefill": prefill,
        "new_tokens": new_tokens,
        "repeat": repeat,
    }
    report = Report("peers", settings)
    with Artifacts(shape, cache, ternary=wanted.weights == "ternary") as artifacts:
        lineup = gather(wanted, artifacts)
        report.notes += lineup.notes
        comparison = Comparison(prefill, new_tokens, contexts)
        try:
            compare(lineup.peers, comparison, repeat, wanted.threads, Progress())
            report.results = {**comparison.to_json(), "resident_bytes": resident_bytes()}
        finally:
            report.versions = lineup.versions()
            lineup.close()
        report.tables = [comparison.table()]
        _add_roofline(report, comparison, lineup)
    return report


def _add_roofline(report: Report, comparison: Comparison, lineup: Lineup) -> None:
    rows = {
        label: {
            context: comparison.roofline(
                label, context, token_bytes(bundle, range(context, context + comparison.new_tokens))
            )
            for context in comparison.contexts
        }
        for label, bundle in lineup.bundles.items()
    }
    report.tables.append(roofline_table(rows))
    report.results["roofline"] = rows
    for label, bundle in lineup.bundles.items():
        linear, elements = WeightBytes.of(bundle).linear, bundle.manifest.weights["linear_parameters"]
        report.results.setdefault("linear_share_of_bf16", {})[label] = linear / (2 * elements)
        report.notes.append(
            f"{label}: linear layers {linear / 1e6:.1f} MB, {linear / (2 * elements):.2%} of bf16"
        )
    resident = report.results["resident_bytes"]
    kinds = ", ".join(f"{name} {value / 1e6:.0f}" for name, value in resident.items())
    total = f"{sum(resident.values()) / 1e6:.0f} MB ({kinds})"
    report.notes.append(f"resident memory of this process with every row of ours: {total}")
