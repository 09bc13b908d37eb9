"""Time and peak memory of our export beside optimum-intel's and onnxruntime-genai's, on one shape in one run.

Both run in venvs of their own. optimum-intel exports plain MiniCPM only through remote code for old
transformers, and onnxruntime-genai's builder knows no MiniCPM, so they get a Llama config of equal dimensions
over the same weights; so does ours, beside the real MiniCPM config.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.table import Table

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.llama_config import as_llama
from cpm_edge.benchmarks.peers.lineup import optimum_command
from cpm_edge.benchmarks.random_checkpoint import write_checkpoint
from cpm_edge.benchmarks.report import Report
from cpm_edge.benchmarks.samples import Samples, ratio
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress

SAMPLE_SECONDS = 0.02
PEER = "optimum-cli export openvino, llama config"
BUILDER = "onnxruntime-genai builder, llama config"
PEERS = (PEER, BUILDER)


@dataclass(frozen=True)
class Cost:
    """Wall time in seconds and the peak of resident bytes summed over the process tree."""

    seconds: float
    peak_bytes: int


def measure(command: list[str], log: Path) -> Cost:
    """Run a command to its end and measure it.

    Raises:
        BenchError: it failed; shows the end of its output.
    """
    start, peak = time.perf_counter(), 0
    with log.open("wb") as output:
        child = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            peak = max(peak, _tree_bytes(child))
            time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BenchError(f"{' '.join(command)} failed:\n{tail}")
    return Cost(time.perf_counter() - start, peak)


def _tree_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(
    shape: Shape,
    optimum_cli: Path | None,
    genai_python: Path | None,
    repeat: int,
    targets: tuple[str, ...],
    verify: bool,
) -> Report:
    """Export alternately, ``repeat`` times each.

    Args:
        optimum_cli, genai_python: programs of the peers' venvs; those that are None are left out.
        targets: ours.
        verify: measure ours with verification too.
    """
    settings = {"shape": shape.name, "repeat": repeat, "targets": list(targets), "verify": verify}
    report = Report("export", settings)
    with tempfile.TemporaryDirectory(prefix="cpm-bench-") as name:
        folder = Path(name)
        with Progress().stage(f"Writing a random checkpoint ({shape.name})"):
            write_checkpoint(shape, folder / "minicpm")
            as_llama(folder / "minicpm", folder / "llama")
        commands = _our_commands(folder, targets, verify)
        if optimum_cli is not None:
            commands[PEER] = optimum_command(optimum_cli, folder / "llama", folder / "out")
        else:
            report.notes.append("optimum-intel was not measured: give --optimum-cli PATH")
        if genai_python is not None:
            commands[BUILDER] = builder_command(genai_python, folder / "llama", folder / "out")
        else:
            report.notes.append("onnxruntime-genai's builder was not measured: give --genai-python PATH")
        _measure_all(report, commands, repeat, folder)
    return report


def builder_command(python: Path, checkpoint: Path, output: Path) -> list[str]:
    """onnxruntime-genai's builder for the CPU: int4 in groups of 128, symmetric."""
    module = "onnxruntime_genai.models.builder"
    options = ["int4_block_size=128", "int4_is_symmetric=true"]
    paths = ["-i", str(checkpoint), "-o", str(output), "-c", f"{output}-cache"]
    return [str(python), "-m", module, *paths, "-p", "int4", "-e", "cpu", "--extra_options", *options]


def _our_commands(folder: Path, targets: tuple[str, ...], verify: bool) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "cpm_edge.exporter.cli", "--weight-format", "int4", "--group-size", "128"]
    commands = {}
    for target in targets:
        for source in ("llama", "minicpm"):
            export = [*ours, "-m", str(folder / source), "-t", target, "-o", str(folder / "out")]
            commands[f"cpm-export {target}, {source} config"] = [*export, "--no-verify"]
            if verify:
                commands[f"cpm-export {target}, {source} config, --verify"] = export
    return commands


def _measure_all(report: Report, commands: dict[str, list[str]], repeat: int, folder: Path) -> None:
    seconds = {name: Samples() for name in commands}
    peaks = {name: Samples() for name in commands}
    sizes: dict[str, int] = {}
    for number in range(1, repeat + 1):
        for name, command in commands.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            with Progress().stage(f"{number} of {repeat}: {name}"):
                cost = measure(command, folder / "log")
            seconds[name].add(cost.seconds)
            peaks[name].add(cost.peak_bytes)
            sizes[name] = folder_bytes(folder / "out")
    peers = [peer for peer in PEERS if peer in commands]
    ratios = [f"{peer.split()[0]}'s {what}" for peer in peers for what in ("time", "memory")]
    table = Table("export, int4 g128 sym", "seconds", "peak RSS, GB", "output, MB", *ratios)
    for name in commands:
        table.add_row(
            name,
            seconds[name].text(),
            Samples(value / 1e9 for value in peaks[name].values).text(2),
            f"{sizes[name] / 1e6:.0f}",
            *(_ratio(each, peer, name) for peer in peers for each in (seconds, peaks)),
        )
    report.tables.append(table)
    report.results = {
        name: {"seconds": seconds[name].values, "peak_bytes": peaks[name].values, "output_bytes": sizes[name]}
        for name in commands
    }


def _ratio(costs: dict[str, Samples], peer: str, name: str) -> str:
    """How many times as much the peer takes."""
    return "" if name in PEERS else f"{ratio(costs[peer], costs[name])}x"
