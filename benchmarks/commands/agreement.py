"""``cpm-bench agreement``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import SETTINGS, json_option
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.runtimes.console import report_errors

PROMPT = "Write a short story about a lighthouse keeper and her dog."
EXAMPLES = """
\b
Examples:
  cpm-bench agreement --model SmolLM2-135M-Instruct.Q4_1.gguf
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--model", required=True, help="The checkpoint to export.")
@click.option("--tokens", default=64, type=click.IntRange(min=1), help="How many to generate.")
@click.option("--weight-format", default="int4", help="Weight format of the linear layers.")
@click.option("--prompt", default=PROMPT, help="The question that is answered.")
@json_option
@report_errors
def agreement(model: str, tokens: int, weight_format: str, prompt: str, json_file: Path | None) -> None:
    """Greedy tokens of every runtime against the traced modules.

    Ours, openvino_genai and onnxruntime_genai, on the weights that the bundles hold. Exit status 1 when one
    of them disagrees where the two best logits are further apart than 0.01.
    """
    from cpm_edge.benchmarks.agreement import run
    from cpm_edge.benchmarks.report import check_file

    check_file(json_file)
    with warnings_printed():
        report = run(model, tokens, weight_format, prompt)
    report.publish(json_file)
    if not report.results["holds"]:
        raise SystemExit(1)
