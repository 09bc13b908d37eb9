"""``cpm-bench checkpoint``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import PATH, SETTINGS, shape_options
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench checkpoint --shape minicpm4-8b -o random-8b
  cpm-bench checkpoint --shape minicpm4-0.5b --layers 4 --ternary -o random-ternary
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@shape_options
@click.option("-o", "--output", required=True, type=PATH, help="Folder to make.")
@click.option("--ternary", is_flag=True, help="Linear layers of -1, 0, 1 times a scale for 128 columns.")
@report_errors
def checkpoint(shape: str, layers: int | None, output: Path, ternary: bool) -> None:
    """Write a checkpoint with random weights in a model's shape."""
    from cpm_edge.benchmarks.random_checkpoint import write_checkpoint
    from cpm_edge.benchmarks.shape import Shape

    with warnings_printed():
        write_checkpoint(Shape.open(shape).changed(layers=layers), output, ternary=ternary)
