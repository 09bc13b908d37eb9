"""``cpm-bench kernels --cubins``: what the compiled kernels of a Jetson take, without running them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.table import Table

from cpm_edge.benchmarks.report import Report
from cpm_edge.exporter.cubins.compile import compile_cubins
from cpm_edge.exporter.cubins.index import Index
from cpm_edge.exporter.progress import Progress


def report_cubins(sm: int) -> Report:
    """Compile every shipped configuration and report its resources.

    Raises:
        BackendError, ExportError: as ``compile_cubins``.
    """
    with Progress().stage("compile"), tempfile.TemporaryDirectory() as folder:
        index = compile_cubins(Path(folder), sm)
    report = Report("kernels", {"cubins": True, "sm": sm})
    report.tables.append(_table(index))
    report.results["cubins"] = [each.to_json() | {"occupancy": each.occupancy(sm)} for each in index.cubins]
    report.versions |= {"triton": index.triton, "ptxas": index.toolchain.version, "ptx": index.ptx}
    report.notes.append("compiled, not run: occupancy is theoretical, and there are no times here")
    return report


def _table(index: Index) -> Table:
    made_by = f"Triton {index.triton}, ptxas {index.toolchain.version}, PTX {index.ptx}"
    sm = index.toolchain.platform.sm
    table = Table(title=f"cubins for sm_{sm} ({made_by})", title_justify="left")
    table.add_column("kernel")
    for column in ("warps", "stages", "registers", "spills", "shared memory", "occupancy", "bytes"):
        table.add_column(column, justify="right")
    for each in index.cubins:
        config = each.config
        cells = (config.warps, config.stages, each.registers, each.stack_bytes, each.shared_bytes)
        occupancy = f"{each.occupancy(sm):.0%}"
        table.add_row(config.name, *map(str, cells), occupancy, f"{each.bytes:,}")
    return table
