"""``cpm-bench context``: from options to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.artifacts import Artifacts, Build
from cpm_edge.benchmarks.context.attention import AttentionProbe
from cpm_edge.benchmarks.context.decode import FilledDecoder, measure_decode
from cpm_edge.benchmarks.context.footprint import footprint_table, measure_footprint
from cpm_edge.benchmarks.context.prefill import (
    PrefillResult,
    measure_attention,
    measure_prefill,
    peer_width,
    spans_to,
)
from cpm_edge.benchmarks.context.recurrent import (
    RecurrentProbe,
    kept_bytes,
    kept_table,
    parts_table,
    recurrent_note,
)
from cpm_edge.benchmarks.context.synthetic import Synthetic
from cpm_edge.benchmarks.peers.lineup import STOCK, llama_file
from cpm_edge.benchmarks.peers.llama_cpp import LlamaCppPeer
from cpm_edge.benchmarks.report import Report
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.benchmarks.token_bytes import attention_spec
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.cache_layout import RecurrentLayout, kv_layers

SPARSE = Build(attention="sparse")
DENSE = Build(attention="dense")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        contexts: ascending; ratios are to the first, memory is measured at the last.
        dense: also decode with our dense attention.
        prefill_to: length of the prefilled prompt, 0 for none.
        stock: prefill with OpenVINO's own operators up to ``peer_context``.
        peer_context: how far peers are measured.
    """

    contexts: Sequence[int]
    threads: int
    new_tokens: int
    repeat: int
    dense: bool
    prefill_to: int
    stock: bool
    peer_context: int
    llama_bench: Path | None = None


def run(shape: Shape, settings: Settings, cache: Path | None) -> Report:
    """Make the bundles, then measure decode, prefill and memory, in this order."""
    longest = max(*settings.contexts, settings.prefill_to)
    shape = shape.changed(context=longest + settings.new_tokens + 1)
    plain = asdict(settings) | {"llama_bench": settings.llama_bench and str(settings.llama_bench)}
    report = Report("context", {"shape": shape.name, "config": shape.config, **plain})
    builds = {"sparse": SPARSE, **({"dense": DENSE} if settings.dense else {})}
    with Artifacts(shape, cache) as artifacts:
        for build in builds.values():
            artifacts.bundle(build)
        if settings.stock and settings.prefill_to:
            artifacts.bundle(STOCK)
        gguf = llama_file(settings.llama_bench, artifacts, "Q4_0", report.notes)
        artifacts.finish()
        llama = []
        if gguf is not None and settings.llama_bench is not None:
            llama = [
                LlamaCppPeer(settings.llama_bench, gguf, "Q4_0", settings.threads, flash) for flash in (0, 1)
            ]
        _measure(report, settings, {row: artifacts.bundle(build) for row, build in builds.items()}, llama,
                 artifacts.bundle(STOCK) if settings.stock and settings.prefill_to else None)  # fmt: skip
    return report


def _measure(
    report: Report,
    settings: Settings,
    paths: dict[str, Path],
    llama: Sequence[LlamaCppPeer],
    stock: Path | None,
) -> None:
    progress = Progress()
    # First, while nothing else of this process is in memory.
    longest = settings.contexts[-1]
    with progress.stage(f"memory at {longest}"):
        found = measure_footprint(paths["sparse"], longest, settings.threads)
    bundles = {row: open_bundle(path) for row, path in paths.items()}
    manifest = bundles["sparse"].manifest
    spec, size = attention_spec(bundles["sparse"]), manifest.cache["head_dim"]
    with progress.stage("drawing keys and values"):
        rows = max(longest, settings.prefill_to) + 1
        recurrent = RecurrentLayout.of(manifest.cache)
        synthetic = Synthetic(spec.kv_num_heads, rows, size, recurrent=recurrent)
        layers = len(kv_layers(manifest.cache))
        probe = AttentionProbe(spec, size, layers, rows, settings.threads, synthetic)
    try:
        _decode(report, settings, bundles, probe, synthetic, llama, progress)
        if settings.prefill_to:
            _prefill(report, settings, bundles["sparse"], probe, stock, progress)
    finally:
        probe.close()
    report.tables.append(footprint_table(found, longest))
    report.results["memory"] = {"context": longest, **found}


def _decode(
    report: Report,
    settings: Settings,
    bundles: dict[str, Any],
    probe: AttentionProbe,
    synthetic: Synthetic,
    llama: Sequence[LlamaCppPeer],
    progress: Progress,
) -> None:
    engines = {row: open_engine(bundle, threads=settings.threads) for row, bundle in bundles.items()}
    decoders = {row: FilledDecoder(engine, synthetic) for row, engine in engines.items()}
    layout = RecurrentLayout.of(bundles["sparse"].manifest.cache)
    recurrent = RecurrentProbe(layout, settings.threads, synthetic) if layout else None
    kept: dict[int, dict[str, int]] = {}
    try:
        result = measure_decode(
            decoders,
            probe,
            llama,
            settings.contexts,
            peer_context=settings.peer_context,
            new_tokens=settings.new_tokens,
            repeat=settings.repeat,
            threads=settings.threads,
            progress=progress,
            recurrent=recurrent.decode if recurrent else None,
        )
        if layout:
            kept = {context: kept_bytes(decoders["sparse"].session(context)) for context in settings.contexts}
    finally:
        if recurrent:
            recurrent.close()
        for row, decoder in decoders.items():
            decoder.close()
            engines[row].close()
    table, roofline = result.roofline(bundles, settings.new_tokens)
    report.tables += [result.speed_table(), result.attention_table(), table]
    report.results["decode"] = {**result.to_json(), "roofline": roofline}
    if layout:
        report.tables += [parts_table(result), kept_table(kept, settings.contexts)]
        report.results["kept_bytes"] = {str(context): parts for context, parts in kept.items()}
        report.notes.append(recurrent_note(layout, bundles["sparse"].manifest.attention))
    if llama:
        report.versions["llama.cpp"] = llama[0].build


def _prefill(
    report: Report,
    settings: Settings,
    bundle: Any,
    probe: AttentionProbe,
    stock: Path | None,
    progress: Progress,
) -> None:
    vocab_size = bundle.manifest.vocab_size
    engine = open_engine(bundle, threads=settings.threads)
    ours = measure_prefill(engine, spans_to(settings.prefill_to), vocab_size, progress, "ours")
    engine.close()
    result = PrefillResult(ours, measure_attention(probe, settings.prefill_to, progress))
    if stock is not None:
        engine = open_engine(open_bundle(stock), threads=settings.threads)
        tokens = min(settings.prefill_to, settings.peer_context)
        spans = spans_to(tokens, peer_width(tokens))
        result.stock = measure_prefill(engine, spans, vocab_size, progress, "OpenVINO stock")
        engine.close()
    report.tables += [result.table(), result.summary_table()]
    report.results["prefill"] = result.to_json()
