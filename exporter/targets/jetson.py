"""TensorRT on Jetson: a graph that the device builds its engine from.

``native`` has plugin nodes and brings the plugins with kernels compiled for the chip (engine_native);
``stock`` has standard operators only.
"""

from __future__ import annotations

from cpm_edge.exporter.targets.common import BuildJob, Built
from cpm_edge.exporter.targets.engine_graph import write_graph
from cpm_edge.exporter.targets.engine_manifest import (
    cache_of,
    engine_of,
    memory_of,
    stock_chunk,
    stock_workspace,
)
from cpm_edge.exporter.targets.engine_stock import STOCK, stock_ops


def build(job: BuildJob) -> Built:
    """Write the graph, and for ``native`` plugins and kernels, into ``job.folder``.

    Raises:
        ExportError: a tensor that the engine does not take, memory that the chip lacks, or a disk error.
    """
    if job.flavour == "native":
        from cpm_edge.exporter.targets.engine_native import build_native

        return build_native(job)
    table = write_graph(job, STOCK)
    chunk = stock_chunk(job)
    return Built(
        engine_of(None, chunk, table, memory_of(job, stock_workspace(job, chunk)), None),
        cache_of(job, "rows_out"),
        "fp16",
        stock_ops(job),
        flavour="stock",
    )
