from __future__ import annotations

import json
from pathlib import Path

from cpm_edge.benchmarks.shape import shape_names
from tests.benchmarks.shapes import TINY, bench, write_shape


def test_the_report(tmp_path: Path) -> None:
    shape, file = write_shape(tmp_path, TINY, num_hidden_layers=1), tmp_path / "out.json"
    options = ("--sm", 89, "--context", 64, "--weight-format", "int8", "--json", file)
    result = bench("trt-build", shape, *options)
    assert result.exit_code == 0, result.output
    cost = json.loads(file.read_text())["results"]["int8"]["89"]
    assert cost["engine_bytes"] > 1e6 and cost["seconds"] > 0 and cost["peak_bytes"] > 1e8
    # Embedding (tied), one layer and its norms, a byte each, in pages of their own.
    assert 320 * 128 + 128 * 384 + 3 * 128 * 256 < cost["graph_bytes"] < 400_000
    assert "peak RSS" in result.output and "built, not run" in result.output


def test_bad_shapes(tmp_path: Path) -> None:
    result = bench("trt-build", tmp_path / "none.json")
    assert result.exit_code == 1 and all(name in result.output for name in shape_names())
