"""``cpm-bench accuracy``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import PATH, SETTINGS, json_option
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench accuracy smollm2-aipc --reference SmolLM2-135M-Instruct.Q4_1.gguf --text TEXT.txt
  cpm-bench accuracy minicpm4-int4 --reference ./MiniCPM4-0.5B --text TEXT.gz --json accuracy.json
  cpm-bench run minicpm4-int4 --accuracy accuracy.json -o report.html
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("bundle", type=PATH)
@click.option("--reference", required=True, help="The checkpoint that it was exported from.")
@click.option("--text", required=True, type=PATH, help="The text to score, plain or .gz.")
@click.option("--characters", default=(20_000, 60_000), type=(int, int), help="Part of the text: from, to.")
@click.option("--window", default=512, type=click.IntRange(min=2), help="Tokens that share a context.")
@click.option("--windows", default=4, type=click.IntRange(min=1), help="How many windows to score.")
@click.option(
    "--new-tokens", default=64, type=click.IntRange(min=1), help="Tokens of each greedy continuation."
)
@json_option
@report_errors
def accuracy(
    bundle: Path,
    reference: str,
    text: Path,
    characters: tuple[int, int],
    window: int,
    windows: int,
    new_tokens: int,
    json_file: Path | None,
) -> None:
    """Perplexity, KL divergence and agreement of a bundle with its checkpoint, on a text."""
    from cpm_edge.benchmarks.bundle.accuracy import Settings, run
    from cpm_edge.benchmarks.report import check_file

    check_file(json_file)
    settings = Settings(characters, window, windows, min(64, window // 2), new_tokens)
    with warnings_printed():
        report = run(bundle, reference, text, settings)
    report.publish(json_file)
