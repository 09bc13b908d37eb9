"""``cpm-bench trace``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import SETTINGS, json_option
from cpm_edge.benchmarks.shape import shape_names
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench trace
  cpm-bench trace minicpm4-8b ./MiniCPM4.1-8B/config.json --repeat 3
  cpm-bench trace tests/data/configs/*.json --json traces.json
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("shapes", nargs=-1, metavar="[NAME|CONFIG.json]...")
@click.option("--repeat", default=1, type=click.IntRange(min=1), help="Rounds of the run.")
@json_option
@report_errors
def trace(shapes: tuple[str, ...], repeat: int, json_file: Path | None) -> None:
    """Time and memory of tracing models at their full size, without weights.

    Every trace has a process of its own. Without arguments: the shapes that come with the benchmarks.
    """
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.benchmarks.shape import Shape
    from cpm_edge.benchmarks.trace_shapes import run

    check_file(json_file)
    run([Shape.open(name) for name in shapes or shape_names()], repeat).publish(json_file)
