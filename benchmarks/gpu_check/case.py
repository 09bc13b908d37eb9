"""One launch plan with inputs, what its results must be, and what to compare its speed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpm_edge.benchmarks.gpu_check.launcher import prepare
from cpm_edge.plugins.launch_plan import LaunchPlan

Array = npt.NDArray[Any]
Call = Callable[[], object]


@dataclass(frozen=True)
class Empty:
    """An output that is written to memory of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Case:
    """One op at one size.

    Attributes:
        op, name: what a table shows.
        rows: new tokens.
        inputs: of the op in order, None where it has none.
        outputs: an ``Empty``, or the index of the input that is updated in place.
        error: of the outputs: their largest error as a share of what rounding explains; above 1 is wrong.
        bytes: that must be moved at least; operations: multiplications and additions.
        peer, make_peer: what PyTorch runs for the same on a device.
    """

    op: str
    name: str
    rows: int
    plan: LaunchPlan
    inputs: Sequence[Array | None]
    outputs: Sequence[Empty | int]
    error: Callable[[Sequence[Array]], float]
    bytes: int
    operations: int
    peer: str
    make_peer: Callable[[torch.device], Call]


@dataclass
class Outcome:
    """What a case gave; seconds are None where nothing was measured."""

    op: str
    name: str
    rows: int
    kernels: list[str]
    error: float
    bytes: int
    operations: int
    peer: str
    seconds: float | None = None
    peer_seconds: float | None = None

    @property
    def is_right(self) -> bool:
        return self.error <= 1  # False for NaN

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"right": self.is_right}


@dataclass
class Loaded:
    """A case on a device: ``run`` executes its plan, any number of times."""

    case: Case
    run: Call
    outputs: list[torch.Tensor] = field(repr=False)

    @classmethod
    def onto(cls, case: Case, device: torch.device) -> Loaded:
        inputs = [
            None if each is None else torch.from_numpy(each).to(device, copy=True) for each in case.inputs
        ]
        outputs = []
        for each in case.outputs:
            kept = inputs[each] if isinstance(each, int) else None
            if isinstance(each, Empty):
                kept = torch.full(each.shape, torch.nan, dtype=each.dtype, device=device)
            assert kept is not None
            outputs.append(kept)
        return cls(case, prepare(case.plan, inputs, outputs, poison=True), outputs)

    def check(self) -> Outcome:
        """Run once and compare."""
        self.run()
        case = self.case
        error = case.error([each.cpu().numpy() for each in self.outputs])
        kernels = [launch.kernel.name for launch in case.plan.variant(case.rows).launches]
        shared = (case.bytes, case.operations, case.peer)
        return Outcome(case.op, case.name, case.rows, kernels, error, *shared)


def worst(got: Array, expected: Array, bound: Array) -> float:
    """The largest error as a share of its bound; NaN where a result is missing."""
    return float(np.max(np.abs(got.astype(np.float64) - expected) / bound))
