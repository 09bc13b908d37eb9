"""What a subcommand hands out: tables for people, the same and every raw number as JSON.

The JSON object: ``schema`` (1), ``benchmark``, ``command`` (the arguments as given), ``time`` (UTC, ISO
8601), ``machine``, ``versions``, ``settings``, ``notes`` and ``results`` (keys of the subcommand's own).
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cpm_edge.benchmarks import machine
from cpm_edge.benchmarks.errors import BenchError

SCHEMA = 1
WIDTH = 150


@dataclass
class Report:
    """The outcome of one run.

    Attributes:
        benchmark: the subcommand.
        settings: its options, JSON-ready.
        results: every raw number, JSON-ready.
        tables: what is printed.
        notes: what was skipped, and why; what a reader must know.
        versions: of peers, beside those of Python packages.
    """

    benchmark: str
    settings: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "benchmark": self.benchmark,
            "command": sys.argv[1:],
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "versions": {**machine.versions(), **self.versions},
            "settings": self.settings,
            "notes": self.notes,
            "results": self.results,
        }

    def publish(self, file: Path | None) -> None:
        """Print the tables and notes on stdout; write the JSON where a file is asked for."""
        console = plain_console()
        for table in self.tables:
            console.print(table)
        for note in self.notes:
            console.print(f"note: {note}")
        if file is not None:
            file.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def plain_console() -> Console:
    """As wide as a terminal, or WIDTH; names in square brackets stay what they are."""
    console = Console(highlight=False, markup=False, emoji=False)
    return (
        console if console.is_terminal else Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    )


def check_file(file: Path | None) -> None:
    """Refuse a result file that could not be written, before an hour of measuring.

    Raises:
        BenchError: its folder does not exist or is not writable, or it is a folder itself.
    """
    if file is None:
        return
    folder = file.resolve().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BenchError(
            f"{file}: expected a file in a folder that can be written",
            hint="make the folder first",
        )
