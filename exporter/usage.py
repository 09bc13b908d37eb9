"""Which options of ``cpm-export`` go together. Imports no torch."""

from __future__ import annotations

from typing import Any

import click

from cpm_edge.exporter.options import CALIBRATION_TOKENS, TARGETS, ExportOptions


def check_usage(arguments: dict[str, Any], for_plans: dict[str, object]) -> None:
    """What an export needs and a plan does not, and the other way round.

    Raises:
        click.UsageError: an option too few or too many.
    """
    if arguments["target"] is None:
        raise click.UsageError(f"Missing option '-t' / '--target'. Choose from: {', '.join(TARGETS)}")
    if arguments["output"] is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    for option, value in for_plans.items():
        if value is not None:
            raise click.UsageError(f"{option}: expected together with --plan, got {value}")
    _check_calibration(arguments)
    if arguments["save_checkpoint"] is not None:
        saved, output = arguments["save_checkpoint"].resolve(), arguments["output"].resolve()
        if saved.is_relative_to(output) or output.is_relative_to(saved):
            raise click.UsageError(
                "--save-checkpoint: expected another folder than -o, and none inside the other"
            )


def _check_calibration(arguments: dict[str, Any]) -> None:
    """Options that choose how to calibrate are for exports that do.

    Raises:
        click.UsageError: one that would be ignored.
    """
    given = {
        "--dataset": arguments["dataset"] is not None,
        "--calibration-tokens": arguments["calibration_tokens"] != CALIBRATION_TOKENS,
        "--skip-positions": arguments["skip_positions"] is not None,
    }
    for_gptq = {"--no-act-order": not arguments["act_order"], "--damping": arguments["damping"] is not None}
    calibrates = ExportOptions(**arguments).needs_calibration
    for option, is_given in given.items():
        if is_given and not calibrates:
            raise click.UsageError(
                f"{option}: expected together with --method other than rtn, --ratio or --save-checkpoint"
            )
    for option, is_given in for_gptq.items():
        if is_given and "gptq" not in arguments["method"]:
            raise click.UsageError(f"{option}: expected together with --method gptq or gptq+awq")
