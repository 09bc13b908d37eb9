"""``cpm-bench calibration``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import PATH, SETTINGS, int_list, json_option
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.exporter.options import CALIBRATION_TOKENS, METHODS
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench calibration --model SmolLM2-135M-Instruct.Q4_1.gguf --text TEXT.gz --dataset OTHER.txt
  cpm-bench calibration --model MODEL --text TEXT.txt --nncf-python VENV/bin/python --json table.json
  cpm-bench calibration --model MODEL.F16.gguf --text TEXT.txt --method rtn --other MODEL.Q4_K_M.gguf
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--model", required=True, help="The checkpoint: a folder, a Hugging Face id or a GGUF file.")
@click.option("--text", required=True, type=PATH, help="What is scored, plain or .gz.")
@click.option("--dataset", type=PATH, help="Calibration text, as for cpm-export; not a part of --text.")
@click.option(
    "--calibration-tokens",
    default=CALIBRATION_TOKENS,
    type=click.IntRange(min=32),
    help="Tokens of --dataset, at most.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS),
    default=METHODS,
    help="A calibration method; repeat the option for several.",
)
@click.option(
    "--group-size",
    "groups",
    default="32,64",
    type=int_list,
    metavar="N,N",
    help="How many columns share a scale, in one or several group sizes.",
)
@click.option(
    "--nncf-python", type=PATH, help="The Python of a venv with nncf and openvino; none: without NNCF."
)
@click.option(
    "--other",
    "others",
    multiple=True,
    type=PATH,
    help="The same model in another format, a GGUF for example.",
)
@click.option("--characters", default=(20_000, 60_000), type=(int, int), help="Part of the text: from, to.")
@click.option("--window", default=512, type=click.IntRange(min=2), help="Tokens that share a context.")
@click.option("--windows", default=4, type=click.IntRange(min=1), help="How many of them, at most.")
@json_option
@report_errors
def calibration(
    model: str,
    text: Path,
    dataset: Path | None,
    calibration_tokens: int,
    methods: tuple[str, ...],
    groups: tuple[int, ...],
    nncf_python: Path | None,
    others: tuple[Path, ...],
    characters: tuple[int, int],
    window: int,
    windows: int,
    json_file: Path | None,
) -> None:
    """Perplexity and divergence of every calibration method, beside NNCF and other formats, on one text."""
    from cpm_edge.benchmarks.calibration.run import Request, run
    from cpm_edge.benchmarks.programs import check_program
    from cpm_edge.benchmarks.report import check_file

    check_file(json_file)
    check_program("--nncf-python", nncf_python)
    request = Request(
        model,
        text,
        dataset,
        calibration_tokens,
        methods,
        groups,
        characters,
        window,
        windows,
        nncf_python,
        others,
    )
    with warnings_printed():
        report = run(request)
    report.publish(json_file)
