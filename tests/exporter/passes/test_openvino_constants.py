from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.openvino_constants import attach_constants

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def weights(placeholders: set[str], data: dict[str, np.ndarray]) -> Any:
    """Stands in for OpenVinoWeights: one weight ``w`` stored as the tensors of ``data``."""

    def blocks(name: str) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        for placeholder, array in data.items():
            yield placeholder, iter([array[:1], array[1:]])

    inner = SimpleNamespace(names=lambda: ["w"], elements=lambda name: 6, counted=[])
    inner.count_bytes = lambda name, region: inner.counted.append((name, region.length))
    return SimpleNamespace(placeholders=placeholders, weights=inner, data=blocks)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """x + w + 1 with both x and w as parameters."""
    x, w = (ops.parameter([2, 3], ov.Type.f32, name=name) for name in ("x", "w"))
    total = ops.add(ops.add(x, w), ops.constant(np.float32(1)))
    model = ov.Model([total], [x, w], "sum")
    ov.serialize(model, tmp_path / "m.xml", tmp_path / "m.bin")
    return tmp_path


def test_placeholders_become_constants(saved: Path) -> None:
    steps: list[int] = []
    stored = weights({"w"}, {"w": ROWS})
    attach_constants(saved / "m.xml", saved / "m.bin", stored, steps.append)
    assert steps == [6] and stored.weights.counted == [("w", 24)]
    compiled = ov.Core().compile_model(saved / "m.xml", "CPU")
    assert len(compiled.inputs) == 1
    x = np.full((2, 3), 10, np.float32)
    np.testing.assert_array_equal(compiled([x])[0], x + ROWS + 1)


@pytest.mark.parametrize(
    ("placeholders", "data", "message"),
    [
        ({"w", "lost"}, {"w": ROWS}, "weights without a place in the IR: lost"),
        ({"w"}, {"w": ROWS, "more": ROWS}, "weights without a place in the IR: more"),
        ({"w", "gone"}, {"w": ROWS, "gone": ROWS}, "weights not in the IR: gone"),
    ],
)
def test_a_lost_placeholder_is_an_error(
    saved: Path, placeholders: set[str], data: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        attach_constants(saved / "m.xml", saved / "m.bin", weights(placeholders, data), lambda n: None)
