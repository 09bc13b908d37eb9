from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm_edge.benchmarks import trace_shapes
from cpm_edge.benchmarks.shape import Shape, shape_names
from tests.benchmarks.shapes import TINY, bench, write_shape

# Embedding (tied), two layers of 128 wide with 2 of 4 heads for keys, and the norms.
PARAMETERS = 320 * 128 + 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256 + 2 * 128) + 128


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process, where torch is imported already.
    monkeypatch.setattr(trace_shapes, "measure_trace", trace_shapes.trace_cost)
    file = tmp_path / "out.json"
    result = bench("trace", write_shape(tmp_path), "--repeat", 2, "--json", file)
    assert result.exit_code == 0, result.output
    first, second = json.loads(file.read_text())["results"]["tiny"]
    assert first["parameters"] == second["parameters"] == PARAMETERS
    assert 0 < first["constant_bytes"] < 1000 and first["nodes"] == second["nodes"] > 20
    assert first["seconds"] > 0 and first["peak_bytes"] >= first["idle_bytes"] > 0
    assert "tiny" in result.output and "peak RSS" in result.output


def test_a_process_of_its_own(tmp_path: Path) -> None:
    cost = trace_shapes.measure_trace(Shape.open(str(write_shape(tmp_path))))
    assert cost.parameters == PARAMETERS
    assert cost.peak_bytes - cost.idle_bytes < 1 << 30


def test_bad_shapes(tmp_path: Path) -> None:
    result = bench("trace", tmp_path / "none.json")
    assert result.exit_code == 1
    assert "expected one of" in result.output and all(name in result.output for name in shape_names())
    strange = write_shape(tmp_path, TINY, hidden_act="gelu")
    result = bench("trace", strange)
    assert result.exit_code == 1 and "hidden_act: expected" in result.output
