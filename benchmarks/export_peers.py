"""Time and peak memory of our export beside optimum-intel's, on one shape in one run.

    python -m cpm_edge.benchmarks.export_peers --shape minicpm4-0.5b --optimum-cli VENV/bin/optimum-cli

optimum-intel exports plain MiniCPM only through remote code for old transformers, so it gets a Llama config
of equal dimensions over the same weights; so does ours, beside the real MiniCPM config.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.table import Table

from cpm_edge.benchmarks.random_checkpoint import shape_names, write_checkpoint

SAMPLE_SECONDS = 0.02
_MUP = ("scale_emb", "scale_depth", "dim_model_base", "rope_scaling")


@dataclass(frozen=True)
class Cost:
    """Wall time in seconds and the peak of resident bytes summed over the process tree."""

    seconds: float
    peak_bytes: int


def run(command: list[str], log: Path) -> Cost:
    """Run a command to its end and measure it.

    Raises:
        click.ClickException: it failed; shows the end of its output.
    """
    start, peak = time.perf_counter(), 0
    with log.open("wb") as output:
        child = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            peak = max(peak, _tree_bytes(child))
            time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise click.ClickException(f"{' '.join(command)} failed:\n{tail}")
    return Cost(time.perf_counter() - start, peak)


def _tree_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def as_llama(source: Path, folder: Path) -> None:
    """The same weight files under a Llama config of equal dimensions."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    for key in _MUP:
        config.pop(key, None)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@click.command()
@click.option("--shape", default="minicpm4-0.5b", show_default=True, type=click.Choice(shape_names()))
@click.option("--optimum-cli", help="optimum-cli of a venv with optimum-intel.")
@click.option("--repeat", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--targets", default="aipc", show_default=True, help="Ours, separated by commas.")
@click.option(
    "--verify/--no-verify", default=False, show_default=True, help="Measure ours with verification too."
)
def main(shape: str, optimum_cli: str | None, repeat: int, targets: str, verify: bool) -> None:
    """Print a table of seconds and peak RSS, and the ratios to the peer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(shape, folder / "minicpm")
        as_llama(folder / "minicpm", folder / "llama")
        ours = [
            sys.executable,
            "-m",
            "cpm_edge.exporter.cli",
            "--weight-format",
            "int4",
            "--group-size",
            "128",
        ]
        commands = {}
        for target in targets.split(","):
            for source in ("llama", "minicpm"):
                export = [*ours, "-m", str(folder / source), "-t", target, "-o", str(folder / "out")]
                commands[f"cpm-export {target}, {source} config"] = [*export, "--no-verify"]
                if verify:
                    commands[f"cpm-export {target}, {source} config, --verify"] = export
        if optimum_cli:
            commands["optimum-cli export openvino, llama config"] = [
                *[optimum_cli, "export", "openvino", "-m", str(folder / "llama"), "--weight-format", "int4"],
                *["--task", "text-generation-with-past", "--group-size", "128", "--ratio", "1.0", "--sym"],
                str(folder / "out"),
            ]
        _report(commands, repeat, folder)
        if not optimum_cli:
            click.echo("optimum-intel was not measured: give --optimum-cli PATH")


def _report(commands: dict[str, list[str]], repeat: int, folder: Path) -> None:
    best: dict[str, Cost] = {}
    sizes: dict[str, int] = {}
    for _ in range(repeat):
        for name, command in commands.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            cost = run(command, folder / "log")
            sizes[name] = folder_bytes(folder / "out")
            if name not in best or cost.seconds < best[name].seconds:
                best[name] = cost
    peer = best.get("optimum-cli export openvino, llama config")
    table = Table(
        "export, int4 g128 sym", "seconds", "peak RSS, GB", "output, MB", "time ratio", "memory ratio"
    )
    for name, cost in best.items():
        ratios = ("", "") if peer is None else (
            f"{peer.seconds / cost.seconds:.2f}x faster", f"{peer.peak_bytes / cost.peak_bytes:.2f}x less"
        )  # fmt: skip
        table.add_row(
            name, f"{cost.seconds:.1f}", f"{cost.peak_bytes / 1e9:.2f}", f"{sizes[name] / 1e6:.0f}", *ratios
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
