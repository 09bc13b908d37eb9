"""``cpm-bench peers``."""

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
    repeat_option,
    shape_options,
    threads_option,
)
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-bench peers --llama-bench llama.cpp/build/bin/llama-bench
  cpm-bench peers --context 256,8192 --optimum-cli VENV/bin/optimum-cli --openvino-python VENV/bin/python
  cpm-bench peers --weights ternary --llama-bench PATH --bundle-cache models --json ternary.json
  cpm-bench peers --shape minicpm4-8b --no-stock --repeat 3
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@shape_options
@cache_option
@click.option(
    "--weights",
    default="int4",
    type=click.Choice(["int4", "ternary"]),
    help="Weight format of our native rows and llama.cpp's.",
)
@click.option(
    "--attention",
    default="auto",
    type=click.Choice(["auto", "dense", "sparse"]),
    help="Attention of our native rows; auto is the model's own.",
)
@click.option(
    "--context",
    "contexts",
    default="256",
    type=int_list,
    metavar="N,N,...",
    help="Tokens in the cache where decode starts.",
)
@click.option("--prefill", default=512, type=click.IntRange(min=1), help="Length of the measured prompt.")
@click.option("--new-tokens", default=32, type=click.IntRange(min=1), help="Decode steps of a measurement.")
@repeat_option
@threads_option
@click.option("--stock/--no-stock", default=True, help="Measure OpenVINO's own operators, int4 g128.")
@click.option("--llama-bench", type=PATH, help="llama.cpp's benchmark program.")
@click.option("--openvino-ir", type=PATH, help="A stateful OpenVINO IR of the same shape.")
@click.option("--openvino-python", type=PATH, help="The interpreter to run it with.  [default: this one]")
@click.option("--optimum-cli", type=PATH, help="Make that IR with this optimum-cli where it is missing.")
@json_option
@report_errors
def peers(
    shape: str,
    layers: int | None,
    cache: Path | None,
    contexts: tuple[int, ...],
    prefill: int,
    new_tokens: int,
    repeat: int,
    json_file: Path | None,
    **wanted: Any,
) -> None:
    """Our runtime beside llama.cpp and OpenVINO, alternately in one run.

    Random weights in the model's shape. Rows: our native flavour (int4 g32, or ternary), our stock flavour,
    llama.cpp with and without flash attention, and an IR made by somebody else. A peer that is not given is
    skipped with a note; a path that is given and cannot be used is refused at once. Then the roofline: bytes
    read a token against the read bandwidth measured in the same run.
    """
    from cpm_edge.benchmarks.peers.lineup import Wanted
    from cpm_edge.benchmarks.peers.run import run
    from cpm_edge.benchmarks.report import check_file
    from cpm_edge.benchmarks.shape import Shape

    check_file(json_file)
    peers_wanted = Wanted(**wanted)
    peers_wanted.check_paths()
    report = run(
        Shape.open(shape).changed(layers=layers),
        peers_wanted,
        contexts=contexts,
        prefill=prefill,
        new_tokens=new_tokens,
        repeat=repeat,
        cache=cache,
    )
    report.publish(json_file)
