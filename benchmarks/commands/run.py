"""``cpm-bench run`` and ``cpm-bench compare``."""

from __future__ import annotations

import math
from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import PATH, SETTINGS, int_list, json_option
from cpm_edge.runtimes.console import report_errors

RUN_EXAMPLES = """
\b
Examples:
  cpm-bench run smollm2-aipc -o report.html --json run.json
  cpm-bench run minicpm4-int4 --context 512,4096,32768 --repeat 5 --markdown run.md
  cpm-bench run minicpm4-jetson --chip jetson-orin-nx-16gb --seconds 120 --json run.json
"""
COMPARE_EXAMPLES = """
\b
Examples:
  cpm-bench compare before.json after.json
  cpm-bench compare orin.json 258v.json laptop.json -o chips.html
"""


@click.command(epilog=RUN_EXAMPLES, context_settings=SETTINGS)
@click.argument("bundle", type=PATH)
@click.option(
    "--context",
    "contexts",
    default="128,512",
    type=int_list,
    metavar="N,N,...",
    help="Lengths of the prompts, in tokens.",
)
@click.option("--new-tokens", default=32, type=click.IntRange(min=2), help="Tokens that every repeat makes.")
@click.option(
    "--seconds",
    default=90.0,
    type=click.FloatRange(min=0),
    help="Go on for so long: five rounds at least, a hundred at most.",
)
@click.option("--repeat", type=click.IntRange(min=1), help="Rounds, in place of --seconds.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with; all cores without it.")
@click.option(
    "--device",
    help="CPU, GPU, GPU.1, ... or cuda.  [default: cuda for jetson and rtx bundles, else CPU]",
)
@click.option(
    "--chip",
    default="auto",
    metavar="ID",
    help="Whose roofline and predictions: an id that cpm-bench chips lists, auto or this-machine.",
)
@click.option("-o", "--output", type=PATH, help="Write the report here, one HTML file.")
@click.option("--markdown", type=PATH, help="Write it as Markdown, too.")
@click.option("--accuracy", type=PATH, help="JSON of cpm-bench accuracy, for the report.")
@json_option
@report_errors
def run(
    bundle: Path,
    contexts: tuple[int, ...],
    new_tokens: int,
    seconds: float,
    repeat: int | None,
    threads: int | None,
    device: str | None,
    chip: str,
    output: Path | None,
    markdown: Path | None,
    accuracy: Path | None,
    json_file: Path | None,
) -> None:
    """Measure a bundle on this machine: first token, decode, memory, energy, share of the roofline."""
    from cpm_edge.benchmarks.bundle.html import report_html
    from cpm_edge.benchmarks.bundle.markdown import report_markdown
    from cpm_edge.benchmarks.bundle.measure import Settings
    from cpm_edge.benchmarks.bundle.run import run as measure_bundle
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.runtimes import default_device
    from cpm_edge.runtimes.bundle import open_bundle

    files = [file for file in (output, markdown, json_file) if file is not None]
    for file in files:
        check_file(file)
    if len({file.resolve() for file in files}) < len(files):
        raise click.UsageError("-o, --markdown and --json: expected a file of its own for each")
    if not seconds < math.inf:
        raise click.BadParameter(f"expected a number of seconds, got {seconds}", param_hint="--seconds")
    if not chip:
        raise click.BadParameter("expected an id, auto or this-machine", param_hint="--chip")
    device = device or default_device(open_bundle(bundle))
    settings = Settings(tuple(sorted(contexts)), new_tokens, threads, device, repeat, seconds)
    report, record = measure_bundle(bundle, settings, chip, accuracy)
    report.publish(json_file)
    if output is not None:
        output.write_text(report_html(record), encoding="utf-8")
    if markdown is not None:
        markdown.write_text(report_markdown(record), encoding="utf-8")


@click.command(epilog=COMPARE_EXAMPLES, context_settings=SETTINGS)
@click.argument("records", nargs=-1, required=True, type=PATH)
@click.option("-o", "--output", type=PATH, help="Write the overlay here, one HTML file.")
@report_errors
def compare(records: tuple[Path, ...], output: Path | None) -> None:
    """Put the JSON files of several runs together: chips, versions, formats. Ratios are to the first."""
    from cpm_edge.benchmarks.bundle.compare import compare_html, compare_notes, compare_table
    from cpm_edge.benchmarks.bundle.record import read_record
    from cpm_edge.benchmarks.report import check_file, plain_console

    check_file(output)
    found = [read_record(path) for path in records]
    console = plain_console()
    console.print(compare_table(found))
    for note in compare_notes(found):
        console.print(f"note: {note}")
    if output is not None:
        output.write_text(compare_html(found), encoding="utf-8")
