"""TensorRT-RTX, for AI PCs with an NVIDIA GPU: the plugin-free graph; the engine is built on the device."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from cpm_edge.exporter.targets.common import BuildJob, Built
from cpm_edge.exporter.targets.engine_graph import write_graph
from cpm_edge.exporter.targets.engine_manifest import (
    cache_of,
    memory_of,
    stock_chunk,
    stock_workspace,
)
from cpm_edge.exporter.targets.engine_stock import STOCK, stock_ops

NAME = "tensorrt_rtx"
REQUIRES = ">=1.0"


def build(job: BuildJob) -> Built:
    """Write the graph into ``job.folder``.

    Raises:
        ExportError: a tensor that the engine does not take, memory that the chip lacks, or a disk error.
    """
    table = write_graph(job, STOCK)
    chunk = stock_chunk(job)
    engine: dict[str, Any] = {
        "name": NAME,
        "version": _version(),
        "requires": REQUIRES,
        "sm": None,  # TensorRT-RTX compiles on the device
        "prefill_chunk": chunk,
        "plugins": None,
        "embedding": table,
        "memory": memory_of(job, stock_workspace(job, chunk)),
    }
    return Built(engine, cache_of(job, "rows_out"), "fp16", stock_ops(job), flavour="stock")


def _version() -> str:
    try:
        return importlib.metadata.version("tensorrt-rtx")
    except importlib.metadata.PackageNotFoundError:
        return "1.0"
