"""Prefill and decode beside the peers, alternately in one run: medians, ratios, share of the roofline.

    python -m cpm_edge.benchmarks.peers --shape minicpm4-0.5b --context 256 --llama-bench PATH

Ours is the native flavour (int4 g32); the peers are our stock flavour (OpenVINO, int4 g128) and llama.cpp's
llama-bench on a Q4_0 file of the same shape that is written here. What is not given is skipped with a note.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from cpm_edge.benchmarks.llama_file import write_gguf
from cpm_edge.benchmarks.random_checkpoint import shape_names, write_checkpoint
from cpm_edge.exporter.export import export
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.probe import read_bandwidth
from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.session import Engine

PREFILL = 512
NEW_TOKENS = 32


@dataclass
class Rates:
    """Tokens per second of each repeat."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def measure_session(engine: Engine, context: int, vocab_size: int) -> tuple[float, float]:
    """(prefill, decode) tokens per second of one fresh sequence: decode starts at ``context``."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab_size, max(PREFILL, context)).tolist()
    with engine.session() as session:
        session.forward(tokens[:PREFILL])
        session.reset()
        start = time.perf_counter()
        session.forward(tokens[:PREFILL])
        prefill = PREFILL / (time.perf_counter() - start)
        if context > PREFILL:
            session.forward(tokens[PREFILL:context])
        else:
            session.rewind(PREFILL - context)
        session.forward([5])
        start = time.perf_counter()
        for token in range(NEW_TOKENS):
            session.forward([token + 10])
        return prefill, NEW_TOKENS / (time.perf_counter() - start)


def measure_llama(binary: str, model: Path, context: int, threads: int, flash: int) -> tuple[float, float]:
    """The same from one run of llama-bench."""
    command = [binary, "-m", str(model), "-t", str(threads), "-fa", str(flash), "-r", "1", "-o", "json"]
    command += ["-p", str(PREFILL), "-n", str(NEW_TOKENS), "-d", f"0,{context}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(output)
    prefill = next(r["avg_ts"] for r in rows if r["n_prompt"] and not r["n_depth"])
    decode = next(r["avg_ts"] for r in rows if r["n_gen"] and r["n_depth"] == context)
    return float(prefill), float(decode)


@click.command()
@click.option("--shape", default="minicpm4-0.5b", show_default=True, type=click.Choice(shape_names()))
@click.option(
    "--context", default=256, show_default=True, type=click.IntRange(min=1), help="Where decode starts."
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--repeat", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--llama-bench", help="llama.cpp's benchmark program.")
@click.option("--stock/--no-stock", default=True, show_default=True, help="Measure OpenVINO's own operators.")
def main(shape: str, context: int, threads: int, repeat: int, llama_bench: str | None, stock: bool) -> None:
    """Print the table of rates and ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(shape, folder / "checkpoint")
        runs: dict[str, Callable[[], tuple[float, float]]] = {}
        engines = {"ours, native int4 g32": _engine(folder, "native", 32, threads)}
        if stock:
            engines["OpenVINO stock, int4 g128"] = _engine(folder, "stock", 128, threads)
        vocab = json.loads((folder / "checkpoint/config.json").read_text())["vocab_size"]
        for label, engine in engines.items():
            runs[label] = partial(measure_session, engine, context, vocab)
        if llama_bench:
            write_gguf(folder / "checkpoint", folder / "model.gguf")
            for flash in (0, 1):
                model = folder / "model.gguf"
                runs[f"llama.cpp Q4_0, -fa {flash}"] = partial(
                    measure_llama, llama_bench, model, context, threads, flash
                )
        rates = {label: Rates() for label in runs}
        for _ in range(repeat):
            for label, run in runs.items():
                prefill, decode = run()
                rates[label].prefill.append(prefill)
                rates[label].decode.append(decode)
        weights = (folder / "native/openvino_native.bin").stat().st_size
        embedding = _embedding_bytes(folder / "checkpoint")
        _print(rates, weights - embedding, threads, context)
    if not llama_bench:
        click.echo("llama.cpp was not measured: give --llama-bench PATH")


def _engine(folder: Path, flavour: str, group: int, threads: int) -> Engine:
    options = ExportOptions(
        model=str(folder / "checkpoint"),
        target="aipc",
        output=folder / flavour,
        flavour=flavour,
        group_size=group,
        verify=False,
    )
    export(options, Progress(enabled=False))
    return open_engine(open_bundle(options.output), threads=threads)


def _embedding_bytes(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text())
    return int(config["vocab_size"] * config["hidden_size"])


def _print(rates: dict[str, Rates], weight_bytes: int, threads: int, context: int) -> None:
    ours = next(iter(rates.values()))
    table = Table("", "prefill 512, tok/s", "ratio", f"decode at {context}, tok/s", "ratio")
    for label, rate in rates.items():
        prefill, decode = median(rate.prefill), median(rate.decode)
        table.add_row(
            label,
            f"{prefill:.1f}",
            f"{median(ours.prefill) / prefill:.2f}",
            f"{decode:.1f}",
            f"{median(ours.decode) / decode:.2f}",
        )
    bandwidth = read_bandwidth(threads)
    roof = bandwidth / weight_bytes
    console = Console(width=120)
    console.print(table)
    console.print(
        f"roofline: {bandwidth / 1e9:.1f} GB/s read by {threads} threads, {weight_bytes / 1e6:.0f} MB of "
        f"weights a token: {roof:.0f} tok/s; ours reaches {median(ours.decode) / roof:.0%}"
    )


if __name__ == "__main__":
    main()
