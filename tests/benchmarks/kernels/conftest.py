from __future__ import annotations

import pytest

from cpm_edge.benchmarks.kernels import machine_limits
from cpm_edge.benchmarks.kernels.machine_limits import Limits


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """20 GB/s and 100 GFLOP/s, without a measurement."""
    monkeypatch.setattr(machine_limits, "read_bandwidth", lambda threads, repeat: 20e9)
    monkeypatch.setattr(machine_limits, "multiply_adds", lambda threads, repeat: 50e9)
    made = Limits(2)
    made.sample()
    return made
