"""``cpm-export``: from a checkpoint to a bundle."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from cpm_edge.exporter.console import warnings_printed
from cpm_edge.exporter.options import (
    ACTIVATIONS,
    ATTENTION,
    CALIBRATION_TOKENS,
    DEVICES,
    ENGINES,
    FLAVOURS,
    HEAD_FORMATS,
    KV_CACHE,
    METHODS,
    TARGETS,
    WEIGHT_FORMATS,
    ExportOptions,
)
from cpm_edge.exporter.packages import check_packages
from cpm_edge.exporter.usage import check_usage
from cpm_edge.runtimes.console import report_errors

EXAMPLES = """
\b
Examples:
  cpm-export --model openbmb/MiniCPM4-0.5B --target aipc --weight-format int4 -o minicpm4-int4
  cpm-export --model ./MiniCPM4.1-8B --target ort --attention sparse -o minicpm41
  cpm-export --model SmolLM2-135M-Instruct.Q4_1.gguf --target aipc --group-size 64 -o smollm2
  cpm-export --model ./MiniCPM4-8B --plan --chip jetson-orin-nano-8gb
  cpm-export --model ./MiniCPM4-0.5B --target jetson --chip jetson-orin-nano-8gb --max-context 8192 -o orin
  cpm-export --model ./MiniCPM5-1B --target ort --method gptq+awq --dataset chats.jsonl -o minicpm5
  cpm-export --list-models
"""


class Share(click.FloatRange):
    """Above 0 and at most 1; not a number is neither below nor above, and a range alone lets it pass."""

    def __init__(self) -> None:
        super().__init__(0, 1, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        number = float(super().convert(value, param, context))
        if math.isnan(number):
            self.fail(f"{value} is not in the range 0<x<=1.", param, context)
        return number


def _list_models(context: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from cpm_edge.exporter.model_table import plain, rich_table

    console = Console()
    if console.is_terminal:
        console.print(rich_table())
    else:
        click.echo(plain(), nl=False)
    context.exit()


@click.command(epilog=EXAMPLES, context_settings={"max_content_width": 100, "show_default": True})
@click.option("-m", "--model", required=True, metavar="DIR|HF_ID|FILE.gguf", help="The checkpoint.")
@click.option("-t", "--target", type=click.Choice(TARGETS), help="What the bundle runs on.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to make; must not exist.")
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Write nothing: print sizes, memory and predicted speed, from config.json alone. Exit status 1 when "
    "it does not fit.",
)
@click.option(
    "--chip",
    metavar="ID",
    help="What a jetson or rtx bundle is for (its kernels, its memory), or --plan, where it is this machine "
    "by default; see cpm-bench chips.",
)
@click.option("--memory", type=float, metavar="GB", help="With --plan: in place of the chip's.")
@click.option("--device", type=click.Choice(DEVICES), help="With --plan: of the chip.")
@click.option(
    "--weight-format",
    default="auto",
    type=click.Choice(WEIGHT_FORMATS),
    help="Of linear layers. auto: that of a quantized checkpoint (GPTQ, AWQ, QAT, ternary, GGUF), whose "
    "integers are kept, else int4.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    show_default=False,
    help="Columns that share an int4 scale: 32 (default) is the most exact, 128 the smallest. "
    "Quantized checkpoints bring their own.",
)
@click.option("--sym/--asym", "symmetric", default=True, help="int4 without or with zero points.")
@click.option(
    "--embedding-format",
    type=click.Choice(HEAD_FORMATS),
    show_default=False,
    help="Of the token embedding; int8 with int4 and ternary layers, else the weight format.",
)
@click.option(
    "--head-format",
    type=click.Choice(HEAD_FORMATS),
    show_default=False,
    help="Of the output head; like --embedding-format, and equal to it when they are tied.",
)
@click.option(
    "--method",
    default="rtn",
    type=click.Choice(METHODS),
    help="How int4 codes are chosen. rtn: nearest, no data; awq, gptq: calibrated on --dataset, a layer in "
    "memory at a time; an interrupted calibration goes on when the command is repeated.",
)
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    show_default=False,
    help="Calibration text: a text file, or JSON lines with text or chat messages. Default: a mixed text "
    "that comes with cpm-edge.",
)
@click.option(
    "--calibration-tokens",
    default=CALIBRATION_TOKENS,
    type=click.IntRange(min=32),
    help="At most, in whole sequences of 512; more are better, and take longer in proportion.",
)
@click.option(
    "--skip-positions",
    type=click.IntRange(0, 16),
    show_default=False,
    help="Leave the first positions of every sequence out of what calibration minimises. Default: 4, the "
    "P-GPTQ of the MiniCPM4 report; 0 for Llama models, whose first token carries the attention sink.",
)
@click.option(
    "--act-order/--no-act-order",
    default=True,
    help="gptq: columns with the largest inputs first; they keep their places in either case.",
)
@click.option(
    "--damping",
    type=Share(),
    show_default=False,
    help="gptq: added to the diagonal of the second moments, as a share of its mean; more trusts the text "
    "less. Default: 0.01.",
)
@click.option(
    "--ratio",
    default=1.0,
    type=Share(),
    help="Share of the linear weights that become int4; the most sensitive matrices of the rest stay int8.",
)
@click.option(
    "--save-checkpoint",
    type=click.Path(path_type=Path),
    show_default=False,
    help="Also write a GPTQ checkpoint (AWQ with --method awq) into this new folder, for vLLM and others.",
)
@click.option(
    "--attention",
    default="auto",
    type=click.Choice(ATTENTION),
    help="auto: sparse when config.json has sparse_config; sparse: with the published settings.",
)
@click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHE),
    show_default=False,
    help="Type of the KV cache. aipc: fp16, or fp32 with fp32 weights; int8 halves the memory, for dense "
    "models and with --flavour native. ort: fp32. jetson, rtx: fp16.",
)
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    show_default=False,
    help="int8 quantizes the inputs of integer layers at run time: faster, less exact. "
    "Default: int8 for ort, where it is many times faster, fp32 for aipc. jetson and rtx compute in fp16.",
)
@click.option(
    "--flavour",
    type=click.Choice(FLAVOURS),
    show_default=False,
    help="aipc, jetson. stock: standard operators, for every device and other people's tools; native: our "
    "kernels, fastest and sparse. Default: stock for aipc, native for jetson.",
)
@click.option(
    "--max-context", type=click.IntRange(min=1), show_default=False, help="Tokens; the checkpoint's limit."
)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face repository.")
@click.option("--verify/--no-verify", default=True, help="Compare the bundle with the model afterwards.")
@click.option(
    "--verify-tokens",
    default=64,
    type=click.IntRange(min=1),
    help="How many; more than dense_len to compare sparse attention too, which takes long.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing bundle, and the folder of --save-checkpoint."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, no progress.")
@click.option(
    "--list-models", is_flag=True, is_eager=True, expose_value=False, callback=_list_models,
    help="Show the supported models and exit.",
)  # fmt: skip
@click.version_option(package_name="cpm-edge")
@report_errors
def main(
    as_json: bool,
    group_size: str | None,
    plan_only: bool,
    chip: str | None,
    memory: float | None,
    device: str | None,
    **arguments: Any,
) -> None:
    """Export a MiniCPM (or Llama) checkpoint to a bundle that cpm-run runs."""
    arguments["group_size"] = int(group_size) if group_size else None
    if plan_only:
        from cpm_edge.exporter.plan_command import run_plan

        run_plan(
            arguments, chip="auto" if chip is None else chip, memory=memory, device=device, as_json=as_json
        )
        return
    without_plan = None if arguments["target"] in ENGINES else chip
    check_usage(arguments, {"--chip": without_plan, "--memory": memory, "--device": device})
    options = ExportOptions(chip=chip, **arguments)
    check_packages(options.target, options.resolved_flavour)
    # Imported here, so that --help is instant and the check above comes first.
    from cpm_edge.exporter.export import export
    from cpm_edge.exporter.progress import Progress

    with warnings_printed() as messages:
        result = export(options, Progress(enabled=False if as_json else None))
    if as_json:
        report = {
            "output": str(result.folder),
            "seconds": result.seconds,
            "bytes": sum(entry.bytes for entry in result.manifest.files.values()),
            "weights": result.manifest.weights,
            "sensitivities": [dataclasses.asdict(row) for row in result.sensitivities],
            "verification": result.manifest.verification,
            "warnings": messages,
        }
        click.echo(json.dumps(report, indent=2))
        return
    from cpm_edge.exporter.summary import print_summary

    print_summary(result)


if __name__ == "__main__":
    main()
