"""``cpm-bench export``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import PATH, SETTINGS, json_option, shape_options
from cpm_edge.exporter.options import TARGETS
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench export --optimum-cli VENV/bin/optimum-cli --genai-python VENV2/bin/python
  cpm-bench export --shape minicpm4-8b --target ort --target aipc --verify
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@shape_options
@click.option("--optimum-cli", type=PATH, help="optimum-cli of a venv with optimum-intel.")
@click.option(
    "--genai-python", type=PATH, help="python of a venv with onnxruntime-genai, torch and transformers."
)
@click.option("--repeat", default=1, type=click.IntRange(min=1), help="Rounds of the run.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(TARGETS),
    default=("aipc",),
    help="Export with ours for this engine; may be given several times.",
)
@click.option("--verify/--no-verify", default=False, help="Measure ours with verification too.")
@json_option
@report_errors
def export(
    shape: str,
    layers: int | None,
    optimum_cli: Path | None,
    genai_python: Path | None,
    repeat: int,
    targets: tuple[str, ...],
    verify: bool,
    json_file: Path | None,
) -> None:
    """Time and peak memory of our export beside optimum-intel's and onnxruntime-genai's, on one shape."""
    from cpm_edge.benchmarks.export_peers import run
    from cpm_edge.benchmarks.programs import check_program
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.benchmarks.shape import Shape

    check_file(json_file)
    check_program("--optimum-cli", optimum_cli)
    check_program("--genai-python", genai_python)
    small = Shape.open(shape).changed(layers=layers)
    run(small, optimum_cli, genai_python, repeat, targets, verify).publish(json_file)
