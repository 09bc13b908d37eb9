"""``cpm-bench gpu-check``: every op's plan against its reference, then its speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpm_edge.benchmarks.gpu_check import attention, linear_attention, matmul
from cpm_edge.benchmarks.gpu_check.case import Call, Case, Loaded, Outcome
from cpm_edge.benchmarks.kernels.run import sparse_spec
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress

OPS = ("matmul", "attention", "linear-attention")
Timer = Callable[[Call], float]


@dataclass(frozen=True)
class Settings:
    """What to check.

    Attributes:
        ops: of OPS.
        rows: numbers of new rows; 1 is a decode step.
        contexts: tokens that attention sees.
        heads, size: of linear attention; SALA has 32 heads of 128.
    """

    ops: Sequence[str]
    rows: Sequence[int]
    contexts: Sequence[int]
    heads: int
    size: int


def cases(shape: Shape, settings: Settings) -> Iterator[Case]:
    """One at a time, because each holds its inputs."""
    config: Any = shape.parsed()
    if "matmul" in settings.ops:
        yield from matmul.cases(config, settings.rows)
    if "attention" in settings.ops:
        yield from attention.cases(sparse_spec(config), config.head_dim, settings.contexts, settings.rows)
    if "linear-attention" in settings.ops:
        yield from linear_attention.cases(settings.heads, settings.size, settings.rows)


def check(
    found: Iterator[Case], device: torch.device, timer: Timer | None, progress: Progress
) -> list[Outcome]:
    """Compare every case with its reference; measure with ``timer`` those that are right."""
    outcomes = []
    for case in found:
        with progress.stage(f"{case.op}: {case.name}, rows {case.rows}"):
            loaded = Loaded.onto(case, device)
            outcome = loaded.check()
            if timer and outcome.is_right:
                outcome.seconds = timer(loaded.run)
                outcome.peer_seconds = timer(case.make_peer(device))
            outcomes.append(outcome)
    return outcomes
