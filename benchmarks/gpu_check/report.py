"""From settings to what is printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.gpu_check.card import Card, find_card
from cpm_edge.benchmarks.gpu_check.case import Outcome
from cpm_edge.benchmarks.gpu_check.run import Settings, cases, check
from cpm_edge.benchmarks.gpu_check.tables import markdown
from cpm_edge.benchmarks.gpu_check.timing import graph_seconds
from cpm_edge.benchmarks.report import Report
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress


def report_gpu(shape: Shape, settings: Settings, markdown_file: Path | None, json_file: Path | None) -> None:
    """Check and measure on the first GPU, print the table and write the files.

    Raises:
        BackendError, BenchError: as ``find_card``; results that are wrong, after everything was written.
    """
    card = find_card()
    outcomes = check(cases(shape, settings), torch.device("cuda", 0), graph_seconds, Progress())
    publish(card, shape, settings, outcomes, markdown_file, json_file)


def publish(
    card: Card,
    shape: Shape,
    settings: Settings,
    outcomes: Sequence[Outcome],
    markdown_file: Path | None,
    json_file: Path | None,
) -> None:
    """Print and write outcomes.

    Raises:
        BenchError: a result is wrong.
    """
    import triton

    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    text = markdown(card, outcomes, versions)
    report = Report("gpu-check", {"shape": shape.name, "config": shape.config, **asdict(settings)})
    report.results = {"card": card.to_json(), "cases": [each.to_json() for each in outcomes]}
    report.versions["triton"] = triton.__version__
    click.echo(text)
    report.publish(json_file)
    if markdown_file is not None:
        markdown_file.write_text(text, encoding="utf-8")
    wrong = [each for each in outcomes if not each.is_right]
    if wrong:
        first = f"{wrong[0].op}: {wrong[0].name}, rows {wrong[0].rows}"
        raise BenchError(
            f"gpu-check: expected every result within its bound, got {len(wrong)} of {len(outcomes)} "
            f"beyond it, the first one {first}",
            hint="report it with the file of --json",
        )
