"""``cpm-bench kernels``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cpm_edge.benchmarks.commands.options import (
    SETTINGS,
    int_list,
    json_option,
    repeat_option,
    shape_options,
    threads_option,
)
from cpm_edge.exporter.console import warnings_printed
from cpm_edge.exporter.cubins.toolchain import PLATFORMS
from cpm_edge.runtimes.console import report_errors

OPS = ("matmul", "attention", "linear-attention")
SMS = [str(sm) for sm in sorted(PLATFORMS)]
EXAMPLES = """
\b
Examples:
  cpm-bench kernels
  cpm-bench kernels matmul --shape minicpm4-8b --threads 4
  cpm-bench kernels attention --context 8192,131072 --json attention.json
  cpm-bench kernels --cubins --sm 110
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("ops", nargs=-1, type=click.Choice(OPS))
@shape_options
@click.option(
    "--rows",
    default=512,
    type=click.IntRange(min=1),
    help="Rows of a prefill, in products and in linear attention.",
)
@click.option(
    "--context",
    "contexts",
    default="256,2048,8192,32768,131072",
    type=int_list,
    metavar="N,N,...",
    help="Rows in the cache of attention.",
)
@click.option(
    "--positions",
    default="1,4096,1048576",
    type=int_list,
    metavar="N,N,...",
    help="Rows before a decode step of linear attention.",
)
@click.option("--heads", default=32, type=click.IntRange(min=1), help="Heads of linear attention.")
@click.option(
    "--size", default=128, type=click.IntRange(min=8), help="Columns of a head of linear attention."
)
@click.option(
    "--cubins",
    is_flag=True,
    help="Instead: compile the kernels of Jetson, and print registers, spills, shared memory and occupancy.",
)
@click.option(
    "--sm",
    default="87",
    type=click.Choice(SMS),
    help="With --cubins: the compute capability times ten. 87 is Orin, 110 Thor; others are cards.",
)
@repeat_option
@threads_option
@json_option
@report_errors
def kernels(
    ops: tuple[str, ...],
    shape: str,
    layers: int | None,
    cubins: bool,
    sm: str,
    json_file: Path | None,
    **settings: Any,
) -> None:
    """Our CPU kernels alone, at a model's shapes, against the machine's limits.

    OPS: matmul, attention, linear-attention; all of them when none is named. Products with packed weights:
    bytes and multiply-adds a second in every format, and the error against the dequantized product.
    Attention: decode and prefill, sparse and dense. Linear attention: beside ONNX Runtime's operator.

    --cubins needs the extra jetson-export and no GPU: it compiles for --sm and runs nothing.
    """
    from cpm_edge.benchmarks.kernels.run import Settings, run
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.benchmarks.shape import Shape

    check_file(json_file)
    if cubins:
        if ops:
            raise click.UsageError(f"--cubins: expected no OPS beside it, got {' '.join(ops)}")
        from cpm_edge.benchmarks.kernels.cubins import report_cubins

        report_cubins(int(sm)).publish(json_file)
        return
    with warnings_printed():
        report = run(Shape.open(shape).changed(layers=layers), Settings(ops=ops or OPS, **settings))
    report.publish(json_file)
