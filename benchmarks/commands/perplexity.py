"""``cpm-bench perplexity``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import PATH, SETTINGS, json_option
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.exporter.options import TARGETS
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench perplexity --model SmolLM2-135M-Instruct.Q4_1.gguf --text debian-reference.en.txt
  cpm-bench perplexity --model MODEL --text TEXT.gz --target aipc --json perplexity.json
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--model", required=True, help="The checkpoint to export.")
@click.option(
    "--text", required=True, type=PATH, help="The text to score, plain or .gz, 60,000 characters or more."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(TARGETS),
    default=TARGETS,
    help="Export for this engine; may be given several times.",
)
@json_option
@report_errors
def perplexity(model: str, text: Path, targets: tuple[str, ...], json_file: Path | None) -> None:
    """Perplexity of one checkpoint in every weight format, from real bundles."""
    from cpm_edge.benchmarks.perplexity import run
    from cpm_edge.benchmarks.report import check_file

    check_file(json_file)
    with warnings_printed():
        report = run(model, text, targets)
    report.publish(json_file)
