"""``cpm-bench gpu-check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cpm_edge.benchmarks.commands.options import PATH, SETTINGS, int_list, json_option, shape_options
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.runtimes.console import report_errors

OPS = ("matmul", "attention", "linear-attention")
EXAMPLES = """
\b
Examples:
  cpm-bench gpu-check
  cpm-bench gpu-check matmul --shape minicpm4-0.5b --rows 1,512
  cpm-bench gpu-check attention --context 8192,131072 --markdown attention.md --json attention.json
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("ops", nargs=-1, type=click.Choice(OPS))
@shape_options
@click.option(
    "--rows",
    default="1,16,512",
    type=int_list,
    metavar="N,N,...",
    help="Rows of new tokens; 1 is a decode step.",
)
@click.option(
    "--context",
    "contexts",
    default="2048,8192,32768",
    type=int_list,
    metavar="N,N,...",
    help="Tokens that attention sees.",
)
@click.option("--heads", default=32, type=click.IntRange(min=1), help="Heads of linear attention.")
@click.option(
    "--size", default=128, type=click.IntRange(16, 128), help="Columns of a head of linear attention."
)
@click.option("--markdown", "markdown_file", type=PATH, help="Write the table here too.")
@json_option
@report_errors
def gpu_check(
    ops: tuple[str, ...],
    shape: str,
    layers: int | None,
    markdown_file: Path | None,
    json_file: Path | None,
    **settings: Any,
) -> None:
    """Run the GPU kernels of Jetson on this machine's NVIDIA GPU.

    OPS: matmul, attention, linear-attention; all of them when none is named. Each op's launches are
    compared with its reference in numpy, then measured: bytes and operations a second, as a share of what the
    card can do, and beside PyTorch's float16 matmul, dense scaled_dot_product_attention and a chunked linear
    attention. Triton compiles the kernels for this card; those of a bundle are compiled ahead of time.

    Needs the extra jetson-export and a CUDA build of torch. Exit status 1 if a result is wrong.
    """
    from cpm_edge.benchmarks.gpu_check.report import report_gpu
    from cpm_edge.benchmarks.gpu_check.run import Settings
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.benchmarks.shape import Shape

    check_file(json_file)
    check_file(markdown_file)
    opened = Shape.open(shape).changed(layers=layers, context=max(settings["contexts"]))
    with warnings_printed():
        report_gpu(opened, Settings(ops=ops or OPS, **settings), markdown_file, json_file)
