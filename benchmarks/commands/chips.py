"""``cpm-bench chips``."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from cpm_edge.benchmarks.commands.options import SETTINGS
from cpm_edge.benchmarks.plan import Chip, Number, chips, detect
from cpm_edge.runtimes.console import report_errors

UNVERIFIED = "unverified"
EXAMPLES = """
\b
Examples:
  cpm-bench chips
  cpm-bench chips --auto
"""


@click.command("chips", epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--auto", is_flag=True, help="Only the chip of this machine; an unknown one is measured once.")
@report_errors
def chips_command(auto: bool) -> None:
    """The chip profiles: what --chip takes, with memory, bandwidth and what predictions are fitted to."""
    table = Table("id", "name", "memory", "GB/s", "of it reached", "fitted to")
    for each in [detect()] if auto else chips().values():
        table.add_row(*_row(each))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(width=150, highlight=False)).print(table)


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
    return UNVERIFIED if number is None else f"{number.value / unit:g}{suffix}"
