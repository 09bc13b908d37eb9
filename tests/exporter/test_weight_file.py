from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.weight_file import ALIGNMENT, WeightFile


def test_regions_are_aligned_and_hold_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    first, second = np.arange(5, dtype=np.float32), np.arange(6000, dtype=np.uint8).reshape(60, 100)
    with WeightFile(path) as file:
        one = file.add([first[:2], first[2:]])
        two = file.add([second[:, ::2], second[:, 1::2]])
        none = file.add([])
    with WeightFile(path, append=True) as file:
        last = file.add([first])
    data = path.read_bytes()
    assert (one.offset, one.length) == (0, 20) and (two.length, none.length) == (6000, 0)
    for region in (one, two, none, last):
        assert region.offset % ALIGNMENT == 0
    assert data[:20] == first.tobytes()
    # Views that are not contiguous are written in their own order.
    expected = second[:, ::2].tobytes() + second[:, 1::2].tobytes()
    assert data[two.offset : two.offset + 6000] == expected
    assert last.offset >= two.offset + 6000 and data[last.offset :] == first.tobytes()


@pytest.mark.parametrize("size", [10, 10_000_000])
def test_a_full_disk_is_an_export_error(size: int) -> None:
    """Also where the bytes leave the buffer only when the file is closed."""
    with (
        pytest.raises(ExportError, match="cannot write full: the disk is full") as caught,
        WeightFile(Path("/dev/full")) as file,
    ):
        file.add([np.zeros(size, np.uint8)])
    assert caught.value.hint is not None and "free some space" in caught.value.hint
