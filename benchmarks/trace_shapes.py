"""Tracing models at their full size: how long it takes, and that no weight is in memory meanwhile."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from rich.table import Table

from cpm_edge.benchmarks.memory import resident_bytes
from cpm_edge.benchmarks.report import Report
from cpm_edge.benchmarks.samples import Samples
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes.stats import peak_rss

ROTARY = "rotary.inv_freq"  # computed from the config, no parameter


@dataclass(frozen=True)
class TraceCost:
    """What one trace took, in a process of its own.

    Attributes:
        seconds: wall time of the trace alone.
        idle_bytes: resident with torch and the exporter imported, before the trace.
        peak_bytes: the most that was resident, the trace included; both 0 where the system does not tell.
        parameters: values of the graph's weights, of which it holds names and shapes.
        constant_bytes: values that the graph does hold, such as axes.
        nodes: of the whole graph, every layer inlined.
    """

    seconds: float
    idle_bytes: int
    peak_bytes: int
    parameters: int
    constant_bytes: int
    nodes: int


def measure_trace(shape: Shape) -> TraceCost:
    """Run ``trace_cost`` in a process of its own.

    Raises:
        ConfigError: the exporter does not know such a model.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(trace_cost, shape).result()


def trace_cost(shape: Shape) -> TraceCost:
    """Trace a model in this process."""
    from cpm_edge.exporter.console import warnings_printed
    from cpm_edge.exporter.registry import find_architecture
    from cpm_edge.exporter.trace import trace

    with warnings_printed():
        config = shape.parsed()
    model = find_architecture(shape.config).model_class()
    idle, start = sum(resident_bytes().values()), time.perf_counter()
    graph = trace(model, config, config.rope.table(config.max_context)).graph
    seconds = time.perf_counter() - start
    names = [name for name, value in graph.initializers.items() if value.const_value is None]
    shapes = [graph.initializers[name].shape for name in names if name != ROTARY]
    held = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    return TraceCost(
        seconds=seconds,
        idle_bytes=idle,
        peak_bytes=peak_rss() or 0,
        parameters=sum(math.prod(sizes.numpy()) for sizes in shapes if sizes is not None),
        constant_bytes=sum(constant.nbytes for constant in held),
        nodes=graph.num_nodes(),
    )


def run(shapes: Sequence[Shape], repeat: int) -> Report:
    """Trace every shape ``repeat`` times, in turns."""
    report = Report("trace", {"shapes": [shape.name for shape in shapes], "repeat": repeat})
    costs: dict[str, list[TraceCost]] = {shape.name: [] for shape in shapes}
    for number in range(1, repeat + 1):
        for shape in shapes:
            with Progress().stage(f"{number} of {repeat}: {shape.name}"):
                costs[shape.name].append(measure_trace(shape))
    report.tables.append(_table(costs))
    report.results = {name: [asdict(cost) for cost in found] for name, found in costs.items()}
    return report


def _table(costs: dict[str, list[TraceCost]]) -> Table:
    table = Table(
        "trace at full size", "parameters", "as bf16, GB", "seconds", "peak RSS, MB", "of it the trace, MB",
        "constants, kB", "nodes",
    )  # fmt: skip
    for name, found in costs.items():
        cost = found[0]
        table.add_row(
            name,
            f"{cost.parameters / 1e9:.3f} G",
            f"{cost.parameters * 2 / 1e9:.2f}",
            Samples(each.seconds for each in found).text(),
            Samples(each.peak_bytes / 1e6 for each in found).text(0),
            Samples((each.peak_bytes - each.idle_bytes) / 1e6 for each in found).text(0),
            f"{cost.constant_bytes / 1e3:.1f}",
            str(cost.nodes),
        )
    return table
