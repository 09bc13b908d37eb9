"""The report of a run as Markdown, for issues and model cards."""

from __future__ import annotations

from cpm_edge.benchmarks.bundle.html import command, subtitle
from cpm_edge.benchmarks.bundle.record import Record
from cpm_edge.benchmarks.bundle.verdict import verdict, warnings


def report_markdown(record: Record) -> str:
    """Verdict, warnings, the table, conditions and the command."""
    lines = [f"# {record.results['bundle']['name']}", "", subtitle(record), "", verdict(record), ""]
    lines += [f"- {text}" for text in warnings(record)]
    lines += ["", "| context | first token, s | prefill, tok/s | decode, tok/s | of roofline | output |"]
    lines.append("|---|---|---|---|---|---|")
    for at in record.at():
        share = "-" if at.share is None else f"{at.share:.0%}"
        lines.append(
            f"| {at.context} | {at.first.text(3)} | {at.prefill_rate.text()} | {at.rate.text()} | {share} | "
            f"{', '.join(at.hashes)} |"
        )
    memory, results = record.results["memory"], record.results
    peak = f"{memory['peak'] / 1e6:.0f} MB" if memory.get("peak") else "unknown"
    joules = results["conditions"].get("joules")
    energy = "not exposed" if joules is None else f"{joules:.0f} J"
    lines += ["", f"Load {results['load_seconds']:.2f} s, peak memory {peak}, energy {energy}.", ""]
    versions = {name: value for name, value in record.content["versions"].items() if value}
    lines += [
        ", ".join(f"{name} {value}" for name, value in versions.items()),
        "",
        "```",
        command(record),
        "```",
    ]
    return "\n".join(lines) + "\n"
