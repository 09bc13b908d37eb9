"""Resident warps against NVIDIA's own calculation."""

from __future__ import annotations

import pytest

from cpm_edge.exporter.cubins.occupancy import occupancy


# What cuda_occupancy.h of CUDA 13.0 says.
@pytest.mark.parametrize(
    ("sm", "warps", "registers", "shared", "percent"),
    [
        *[(87, 4, 39, 32, 100), (87, 4, 124, 12288, 33), (87, 4, 80, 71680, 17), (87, 4, 80, 38912, 33)],
        *[(87, 8, 64, 38912, 67), (86, 4, 80, 38912, 17), (80, 4, 39, 32, 75), (110, 4, 39, 71680, 25)],
        *[(110, 1, 32, 0, 50), (120, 4, 32, 20480, 33), (90, 8, 128, 1024, 25), (89, 2, 40, 0, 100)],
    ],
)
def test_occupancy(sm: int, warps: int, registers: int, shared: int, percent: int) -> None:
    found = occupancy(sm, warps=warps, registers=registers, shared_bytes=shared)
    assert round(100 * found) == percent
