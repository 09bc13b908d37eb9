"""``cpm-bench chips``."""

from __future__ import annotations

from collections.abc import Iterable

import click
from rich.table import Table

from cpm_edge.benchmarks.commands.options import SETTINGS
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.plan import Chip, Number, PlanError, chips, detect
from cpm_edge.benchmarks.plan import chip as find_chip
from cpm_edge.benchmarks.plan.detect import read_signs
from cpm_edge.benchmarks.plan.this_machine import THIS_MACHINE, this_machine
from cpm_edge.benchmarks.report import plain_console
from cpm_edge.runtimes.console import report_errors

UNVERIFIED = "unverified"
EXAMPLES = """
\b
Examples:
  cpm-bench chips
  cpm-bench chips jetson-orin-nx-16gb
  cpm-bench chips --auto
"""


@click.command("chips", epilog=EXAMPLES, context_settings=SETTINGS)
@click.argument("name", metavar="[ID]", required=False)
@click.option("--auto", is_flag=True, help="Only the chip of this machine; an unknown one is measured once.")
@report_errors
def chips_command(name: str | None, auto: bool) -> None:
    """The chip profiles: what --chip takes, with memory, bandwidth and what predictions are fitted to.

    With an ID, every number of that profile and its source.
    """
    if name is not None and auto:
        raise click.UsageError("ID and --auto: expected one of them")
    try:
        plain_console().print(
            _list([detect()] if auto else chips().values()) if name is None else _details(_named(name))
        )
    except PlanError as error:
        raise BenchError(error.message, hint=error.hint) from error


def _named(name: str) -> Chip:
    if name == THIS_MACHINE:
        return this_machine(read_signs())
    return detect() if name == "auto" else find_chip(name)


def _list(found: Iterable[Chip]) -> Table:
    table = Table("id", "name", "memory", "GB/s", "of it reached", "fitted to")
    for each in found:
        table.add_row(*_row(each))
    return table


def _details(chip: Chip) -> Table:
    table = Table("", "", "source", title=f"{chip.name} ({chip.id}), for --target {chip.target}")
    for what, number, unit, suffix in (
        ("memory", chip.memory, 2**30, " GiB"),
        ("of it reserved", chip.reserved, 0.01, " %"),
        ("memory bandwidth", chip.bandwidth, 1e9, " GB/s"),
    ):
        table.add_row(what, _text(number, unit, suffix), number.source if number else "")
    watts = ", ".join(f"{each:g}" for each in chip.power_modes)
    table.add_row("power modes", f"{watts} W" if watts else UNVERIFIED, chip.power_source)
    if chip.sm is not None:
        table.add_row("CUDA compute capability", f"{chip.sm / 10:.1f}", "NVIDIA's list of CUDA GPUs")
    signs = [sign for each in chip.detect.values() for sign in each]
    unsigned = "being measured" if chip.id == THIS_MACHINE else "nothing: pass --chip"
    table.add_row("recognised by", ", ".join(signs) or unsigned, "")
    for key, device in chip.devices.items():
        table.add_section()
        table.add_row(key, device.name, "")
        for kind, rate in (("fp16", " TFLOPS"), ("int8", " TOPS")):
            peak = device.peaks[kind]
            table.add_row(f"{key} {kind}, dense", _text(peak, 1e12, rate), peak.source if peak else "")
        for what, known in (("decode", device.roofline), ("first token", device.prefill)):
            table.add_row(f"{key} {what}", *((known.text(), known.source) if known else (UNVERIFIED, "")))
    return table


def _row(chip: Chip) -> tuple[str, ...]:
    known = next(iter(chip.devices.values())).roofline
    share = f"{known.bandwidth / chip.bandwidth.value:.0%}" if known and chip.bandwidth else "-"
    return (
        chip.id,
        chip.name,
        _text(chip.memory, 2**30, " GiB") if chip.memory else "differs",
        _text(chip.bandwidth, 1e9, ""),
        share,
        known.source if known else "nothing published",
    )


def _text(number: Number | None, unit: float, suffix: str) -> str:
    return UNVERIFIED if number is None else f"{number.value / unit:.4g}{suffix}"
