from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from cpm_edge.benchmarks.memory import resident_bytes, resident_of_file

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_resident_pages_of_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        sum(mapped[:: 1 << 12])
        assert resident_of_file("weights.bin") == 1 << 20
    assert resident_of_file("weights.bin") == 0


def test_memory_by_kind() -> None:
    found = resident_bytes()
    assert set(found) == {"anonymous", "mapped files", "shared"} and found["anonymous"] > 1 << 20
