"""``cpm-bench kernels``: from options to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpm_edge.benchmarks.kernels.attention import attention_json, attention_tables, measure_attention
from cpm_edge.benchmarks.kernels.linear_attention import measure_linear_attention
from cpm_edge.benchmarks.kernels.machine_limits import Limits
from cpm_edge.benchmarks.kernels.matmul import matmul_table, measure_matmul
from cpm_edge.benchmarks.report import Report
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.configs import MiniCPMConfig
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        ops: of "matmul", "attention" and "linear-attention".
        rows: of the many-row products and of linear attention's prefill.
        contexts: of attention; positions: of linear attention's decode.
        heads, size: of linear attention; SALA has 32 heads of 128.
    """

    ops: Sequence[str]
    threads: int
    repeat: int
    rows: int
    contexts: Sequence[int]
    positions: Sequence[int]
    heads: int
    size: int


def run(shape: Shape, settings: Settings) -> Report:
    """Measure each op at the model's shapes."""
    report = Report("kernels", {"shape": shape.name, "config": shape.config, **asdict(settings)})
    limits = Limits(settings.threads)
    progress = Progress()
    config = shape.parsed()
    if "matmul" in settings.ops:
        products = measure_matmul(
            config, limits, rows=settings.rows, repeat=settings.repeat, progress=progress
        )
        report.tables.append(matmul_table(products, limits))
        report.results["matmul"] = [each.to_json() for each in products]
    if "attention" in settings.ops:
        _attention(report, config, settings, limits, progress)
    if "linear-attention" in settings.ops:
        result = measure_linear_attention(
            limits,
            heads=settings.heads,
            size=settings.size,
            rows=settings.rows,
            positions=settings.positions,
            repeat=settings.repeat,
            progress=progress,
        )
        report.tables += [result.table(limits), result.decode_table(limits)]
        report.results["linear_attention"] = result.to_json()
        report.results["linear_attention"]["least_seconds"] = {
            name: samples.median for name, samples in result.least(limits).items()
        }
    report.notes.append(limits.note())
    report.results["limits"] = limits.to_json()
    return report


def _attention(report: Report, config: Any, settings: Settings, limits: Limits, progress: Progress) -> None:
    spec = sparse_spec(config)
    found = measure_attention(
        spec,
        config.head_dim,
        config.num_hidden_layers,
        settings.contexts,
        limits,
        repeat=settings.repeat,
        progress=progress,
    )
    report.tables += attention_tables(found, spec, config.head_dim, limits)
    report.results["attention"] = attention_json(found, spec, config.head_dim)


def sparse_spec(config: Any) -> SparseAttentionSpec:
    """The model's sparse attention, with the published settings where its config has none."""
    if isinstance(config, MiniCPMConfig):
        return config.with_attention("sparse").attention_spec(0)
    return SparseAttentionSpec(config.num_attention_heads, config.num_key_value_heads, config.head_dim**-0.5)
