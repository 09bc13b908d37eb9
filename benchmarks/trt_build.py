"""Building engines of whole models with TensorRT-RTX, which needs no GPU for that: seconds, memory, bytes."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from cpm_edge.benchmarks.artifacts import Artifacts, code_digest
from cpm_edge.benchmarks.report import Report
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.stats import peak_rss
from cpm_edge.runtimes.tensorrt.api import load_api
from cpm_edge.runtimes.tensorrt.build import BuildSpec, build_engine


@dataclass(frozen=True)
class BuildCost:
    """What one engine took, in a process of its own.

    Attributes:
        graph_bytes: of the bundle's graph and weights.
        engine_bytes: of the serialized engine.
        seconds: parsing and building.
        peak_bytes: the most that was resident, the engine included; 0 where the system does not tell.
    """

    graph_bytes: int
    engine_bytes: int
    seconds: float
    peak_bytes: int


def build_cost(bundle: Path, sms: tuple[int, ...]) -> BuildCost:
    """Build an engine of an rtx bundle, or of a stock jetson one, in this process.

    Raises:
        BackendError: tensorrt_rtx is not installed, or the builder failed.
        BundleError: the graph is refused.
    """
    manifest = open_bundle(bundle).manifest
    spec = BuildSpec(
        model=bundle / "model.onnx",
        prefill_chunk=int(manifest.engine["prefill_chunk"]),
        vocab_size=manifest.vocab_size,
        workspace=int(manifest.engine["memory"]["workspace"]),
        sms=sms,
    )
    start = time.perf_counter()
    plan = build_engine(load_api("tensorrt_rtx"), spec).plan
    seconds = time.perf_counter() - start
    graph = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith("model.onnx"))
    return BuildCost(graph, int(plan.nbytes), seconds, peak_rss() or 0)


def measure_build(bundle: Path, sms: tuple[int, ...]) -> BuildCost:
    """Run ``build_cost`` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(build_cost, bundle, sms).result()


def export_bundle(checkpoint: Path, output: Path, weight_format: str, context: int, attention: str) -> None:
    """Export for rtx, unverified."""
    from cpm_edge.exporter.console import warnings_printed
    from cpm_edge.exporter.export import export
    from cpm_edge.exporter.options import ExportOptions

    options = ExportOptions(
        model=str(checkpoint),
        target="rtx",
        output=output,
        weight_format=weight_format,
        max_context=context,
        attention=attention,
        verify=False,
    )
    with warnings_printed():
        export(options, Progress(enabled=False))


def run(
    shape: Shape,
    formats: tuple[str, ...],
    sms: tuple[int, ...],
    context: int,
    attention: str,
    cache: Path | None,
) -> Report:
    """Export a random checkpoint in every format and build each for every compute capability."""
    settings = {
        "shape": shape.name,
        "formats": formats,
        "sm": sms,
        "context": context,
        "attention": attention,
    }
    report = Report("trt-build", settings)
    costs: dict[str, dict[int, BuildCost]] = {}
    code = code_digest("exporter", "quant", "plugins")
    with Artifacts(shape.changed(context=context), cache) as artifacts:
        for weight_format in formats:
            bundle = artifacts.folder / f"rtx-{weight_format}-{context}-{attention}-{code}"
            if not bundle.exists():
                with Progress().stage(f"Exporting {weight_format}"):
                    arguments = (weight_format, context, attention)
                    artifacts.run(export_bundle, artifacts.checkpoint(), bundle, *arguments)
            costs[weight_format] = {}
            for sm in sms:
                with Progress().stage(f"Building {weight_format} for SM {sm}"):
                    costs[weight_format][sm] = measure_build(bundle, (sm,))
    report.tables.append(_table(shape, costs))
    report.results = {
        name: {str(sm): asdict(cost) for sm, cost in found.items()} for name, found in costs.items()
    }
    report.notes.append("built, not run: TensorRT-RTX finishes an engine on the GPU that runs it")
    return report


def _table(shape: Shape, costs: dict[str, dict[int, BuildCost]]) -> Table:
    table = Table(title=f"engines of {shape.name}", title_justify="left")
    for column in ("weights", "SM", "graph, MB", "engine, MB", "seconds", "peak RSS, MB"):
        table.add_column(column, justify="right")
    for name, found in costs.items():
        for sm, cost in found.items():
            sizes = (cost.graph_bytes / 1e6, cost.engine_bytes / 1e6)
            table.add_row(
                name, str(sm), *(f"{size:.0f}" for size in sizes), f"{cost.seconds:.1f}",
                f"{cost.peak_bytes / 1e6:.0f}",
            )  # fmt: skip
    return table
