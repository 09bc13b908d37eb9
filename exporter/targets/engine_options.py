"""What the targets jetson and rtx ask of the options: checked before anything is traced or read."""

from __future__ import annotations

from collections.abc import Mapping

from cpm_edge.benchmarks.plan import Chip, PlanError, chip
from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.options import ExportOptions

WIDE = ("fp32", "bf16")


def check_engine_options(options: ExportOptions, formats: Mapping[str, str], config: LlamaConfig) -> None:
    """Refuse what no engine computes, and a chip of another target.

    Args:
        formats: of ``weight``, ``embedding`` and ``head``.

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
    for kind, form in formats.items():
        if form in WIDE:
            choices = "fp16, int8, int4 or ternary" if kind == "weight" else "fp16 or int8"
            raise ExportError(
                f"--{kind}-format: expected {choices} for target {options.target}, got {form}",
                hint=f"--{kind}-format fp16",
            )
    native = options.resolved_flavour == "native"
    if options.target == "rtx" and native:
        raise ExportError(
            "--flavour: expected stock for target rtx, got native", hint="TensorRT-RTX has no plugins"
        )
    if native and config.attention_spec(0).is_latent:
        raise ExportError(
            "--flavour native: expected attention over keys and values, got latent attention, for which a "
            "Jetson has no kernels",
            hint="--flavour stock",
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
