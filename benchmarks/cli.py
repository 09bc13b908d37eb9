"""``cpm-bench``: the measurements, one subcommand each."""

from __future__ import annotations

import click

from cpm_edge.benchmarks.commands.accuracy import accuracy
from cpm_edge.benchmarks.commands.agreement import agreement
from cpm_edge.benchmarks.commands.calibration import calibration
from cpm_edge.benchmarks.commands.checkpoint import checkpoint
from cpm_edge.benchmarks.commands.chips import chips_command
from cpm_edge.benchmarks.commands.context import context
from cpm_edge.benchmarks.commands.export import export
from cpm_edge.benchmarks.commands.gpu_check import gpu_check
from cpm_edge.benchmarks.commands.kernels import kernels
from cpm_edge.benchmarks.commands.peers import peers
from cpm_edge.benchmarks.commands.perplexity import perplexity
from cpm_edge.benchmarks.commands.run import compare, run
from cpm_edge.benchmarks.commands.trace import trace
from cpm_edge.benchmarks.commands.trt_build import trt_build

EXAMPLES = """
\b
Examples:
  cpm-bench run BUNDLE -o report.html
  cpm-bench peers --llama-bench PATH
  cpm-bench context --context 256,32768 --prefill-to 0
  cpm-bench kernels matmul attention
  cpm-bench gpu-check --markdown gpu.md
  cpm-bench export --optimum-cli VENV/bin/optimum-cli --json export.json
  cpm-bench peers --help
"""


@click.group(epilog=EXAMPLES, context_settings={"max_content_width": 100})
@click.version_option(package_name="cpm-edge")
def main() -> None:
    """Measure cpm-edge and its peers.

    Every subcommand prints its tables; --json keeps every raw number with the machine and the versions.
    """


for command in (
    *(run, compare, accuracy, chips_command),
    *(
        peers,
        context,
        kernels,
        gpu_check,
        agreement,
        perplexity,
        calibration,
        export,
        trace,
        checkpoint,
        trt_build,
    ),
):
    main.add_command(command)


if __name__ == "__main__":
    main()
