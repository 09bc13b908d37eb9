"""``cpm-bench context``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cpm_edge.benchmarks.commands.options import (
    PATH,
    SETTINGS,
    cache_option,
    int_list,
    json_option,
    shape_options,
    threads_option,
)
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench context --json context.json
  cpm-bench context --context 256,32768 --prefill-to 0 --repeat 5
  cpm-bench context --shape minicpm4-8b --context 256,32768 --no-dense --no-stock --bundle-cache models
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@shape_options
@cache_option
@click.option(
    "--context",
    "contexts",
    default="256,2048,8192,32768,131072",
    type=int_list,
    metavar="N,N,...",
    help="Tokens before the measured ones. Ratios are to the smallest, memory is that of the largest.",
)
@click.option("--new-tokens", default=32, type=click.IntRange(min=1), help="Decode steps of a measurement.")
@click.option("--repeat", default=3, type=click.IntRange(min=1), help="Rounds of the decode measurements.")
@click.option("--dense/--no-dense", default=True, help="Also decode with dense attention.")
@click.option(
    "--prefill-to", default=32768, type=click.IntRange(min=0), help="Prompt to prefill once; 0 for none."
)
@click.option("--stock/--no-stock", default=True, help="Prefill with OpenVINO's own operators too.")
@click.option(
    "--peer-context",
    default=8192,
    type=click.IntRange(min=1),
    help="How far peers are measured; beyond it their prefill is extrapolated.",
)
@click.option("--llama-bench", type=PATH, help="llama.cpp's benchmark program.")
@threads_option
@json_option
@report_errors
def context(
    shape: str,
    layers: int | None,
    cache: Path | None,
    contexts: tuple[int, ...],
    json_file: Path | None,
    **settings: Any,
) -> None:
    """Our runtime at long context, with InfLLM-V2 and with dense attention.

    Decode speed at each context on caches that are filled with random keys and values, the attention part
    alone, prefill by position, and the memory of a process at the longest context.
    """
    from cpm_edge.benchmarks.context.run import Settings, run
    from cpm_edge.benchmarks.programs import check_program
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.benchmarks.shape import Shape

    check_file(json_file)
    check_program("--llama-bench", settings["llama_bench"])
    wanted = Settings(contexts=tuple(sorted(contexts)), **settings)
    run(Shape.open(shape).changed(layers=layers), wanted, cache).publish(json_file)
