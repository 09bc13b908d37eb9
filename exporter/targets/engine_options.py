"""What the targets jetson and rtx ask of the options: checked before anything is traced or read."""

from __future__ import annotations

from cpm_edge.benchmarks.plan import Chip, PlanError, chip
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.quant import Policy, WeightFormat

WIDE = (WeightFormat.FP32, WeightFormat.BF16)


def check_engine_options(options: ExportOptions, policy: Policy) -> None:
    """Refuse what no engine computes, and a chip of another target.

    Raises:
        ExportError: names the option.
    """
    for option, value, expected in (
        ("--kv-cache", options.kv_cache, "fp16"),
        ("--activations", options.activations, None),
    ):
        if value not in (None, expected):
            raise ExportError(
                f"{option}: expected {expected or 'none'} for target {options.target}, got {value}",
                hint=f"leave {option} out: TensorRT computes in float16",
            )
    for kind, scheme in (("weight", policy.linear), ("embedding", policy.embedding), ("head", policy.head)):
        if scheme.format in WIDE:
            raise ExportError(
                f"--{kind}-format: expected fp16, int8, int4 or ternary for target {options.target}, got "
                f"{scheme.format.value}",
                hint=f"--{kind}-format fp16",
            )
    native = options.resolved_flavour == "native"
    if options.target == "rtx" and native:
        raise ExportError(
            "--flavour: expected stock for target rtx, got native", hint="TensorRT-RTX has no plugins"
        )
    if options.chip is not None:
        find_chip(options.chip, options.target)
    elif native:
        raise ExportError(
            "--target jetson: expected --chip, which decides what the kernels are compiled for",
            hint="cpm-bench chips lists the ids; --flavour stock needs none",
        )


def find_chip(name: str, target: str) -> Chip:
    """The profile of ``--chip``.

    Raises:
        ExportError: an unknown id, or a chip of another target.
    """
    try:
        profile = chip(name)
    except PlanError as error:
        raise ExportError(error.message, hint=error.hint) from error
    if profile.target != target:
        raise ExportError(
            f"--chip: expected a chip of target {target}, got {profile.id} of target {profile.target}",
            hint=f"--target {profile.target}",
        )
    return profile
