"""How a calibration is done; everything here is part of the fingerprint of its intermediate results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cpm_edge.quant.hessian import DAMPING

SEQUENCE = 512  # tokens of a calibration sequence


@dataclass(frozen=True)
class Settings:
    """What ``cpm-export`` asks of a calibration.

    Attributes:
        method: "rtn", "awq", "gptq" or "gptq+awq".
        tokens: calibration tokens at most.
        ratio: share of the linear weights that become int4; the most sensitive matrices of the rest stay
            int8.
        skipped: positions at the start of each sequence that are left out of the second moments
            (``Architecture.skipped`` unless asked for).
        act_order: columns with the largest inputs first.
        damping: see ``quant.hessian.factorise``.
        seed: chooses among the sequences of a text that is longer than ``tokens``.
    """

    method: str
    tokens: int
    ratio: float = 1.0
    skipped: int = 0
    act_order: bool = True
    damping: float = DAMPING
    seed: int = 0

    @property
    def smooths(self) -> bool:
        """Whether inputs are scaled (AWQ)."""
        return "awq" in self.method

    @property
    def feeds_back(self) -> bool:
        """Whether columns make up for each other's errors (GPTQ)."""
        return "gptq" in self.method

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
