"""``cpm-bench trt-build``."""

from __future__ import annotations

from pathlib import Path

import click

from cpm_edge.benchmarks.commands.options import SETTINGS, cache_option, json_option
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench trt-build
  cpm-bench trt-build minicpm4-8b --weight-format int4 --context 8192
  cpm-bench trt-build --attention sparse --sm 89 --json engines.json
"""


@click.command("trt-build", epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("shape", default="minicpm4-0.5b", metavar="[NAME|CONFIG.json]")
@click.option(
    "--weight-format",
    "formats",
    multiple=True,
    default=("int4",),
    type=click.Choice(["int4", "int8", "fp16"]),
    help="Format of the random weights; may be given several times.",
)
@click.option(
    "--sm",
    "sms",
    multiple=True,
    type=int,
    default=(86, 89),
    help="Compute capability times ten to build for; may be given several times.",
)
@click.option("--context", default=4096, type=click.IntRange(min=1), help="Rows of the cache.")
@click.option(
    "--attention",
    default="dense",
    type=click.Choice(["dense", "sparse"]),
    help="Attention of the model; sparse is InfLLM-V2.",
)
@cache_option
@json_option
@report_errors
def trt_build(
    shape: str,
    formats: tuple[str, ...],
    sms: tuple[int, ...],
    context: int,
    attention: str,
    cache: Path | None,
    json_file: Path | None,
) -> None:
    """Seconds, peak memory and bytes of engines that TensorRT-RTX builds of a whole model.

    No GPU is needed. The weights are random; the graph is the plugin-free one of --target rtx.
    """
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.benchmarks.shape import Shape
    from cpm_edge.benchmarks.trt_build import run

    check_file(json_file)
    run(Shape.open(shape), formats, sms, context, attention, cache).publish(json_file)
