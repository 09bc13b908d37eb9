"""What ``cpm-export`` prints at its end: sizes, formats, seconds, and what the verification found."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cpm_edge.exporter.calibration.mixed import precision_table
from cpm_edge.exporter.export import ExportResult
from cpm_edge.exporter.model_card import cache_cost, linear_layers, sparsity_of


def print_summary(result: ExportResult) -> None:
    """Print it on stderr: stdout is for ``--json``."""
    manifest = result.manifest
    size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    table = Table(show_header=False, box=None)
    table.add_row("bundle", f"{result.folder} ({size:.1f} MB)")
    table.add_row("linear layers", linear_layers(manifest.weights))
    others = manifest.weights["other_groups"]
    if others:
        notes = sorted(set(others.values()))
        table.add_row("", f"{len(others)} tensors in another format: {'; '.join(notes)}")
    table.add_row("embedding, head", f"{manifest.weights['embedding']}, {manifest.weights['head']}")
    if manifest.weights["absorbed"]:
        table.add_row("kv_b_proj", manifest.weights["absorbed"])
    table.add_row("cache", cache_cost(manifest.cache))
    table.add_row(
        "context", f"{manifest.context.max_context} tokens; RoPE: {manifest.context.rope['choice']}"
    )
    table.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items()))
    report = manifest.verification
    if report:
        source = report["against_checkpoint"]
        table.add_row(
            "verified",
            f"cosine {report['cosine']:.6f}, max abs {report['max_abs']:.2e} (logit std "
            f"{report['logit_std']:.2f}), top-1 {report['top1']:.1%} on {report['tokens']} tokens",
        )
        if report["judged_by"] == "median_cosine":
            median = report["median_cosine"]
            table.add_row("", f"median row {median:.6f}, which counts: rounding may turn a choice in a layer")
        if report["mlp_sparsity"]:
            table.add_row("MLP sparsity", sparsity_of(report))
        if manifest.attention["sparse"]:
            table.add_row("", f"{report['sparse_rows']} of them attended sparsely (--verify-tokens)")
        table.add_row(
            "against the checkpoint",
            f"KL {source['kl']:.4f}, cosine {source['cosine']:.4f}, top-1 {source['top1']:.1%}",
        )
    console = Console(stderr=True)
    if result.sensitivities:
        console.print(precision_table(result.sensitivities))
    console.print(table)
