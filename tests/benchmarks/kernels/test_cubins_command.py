"""``cpm-bench kernels --cubins``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cpm_edge.benchmarks.cli import main
from cpm_edge.exporter.cubins import compile as cubins
from cpm_edge.plugins.matmul_nbits.launches import product


def test_the_table_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "shipped_configurations", lambda: [product(4, 128)])
    file = tmp_path / "cubins.json"
    done = CliRunner().invoke(main, ["kernels", "--cubins", "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    (kernel,) = found["results"]["cubins"]
    assert (kernel["name"], found["versions"]["ptxas"]) == ("nbits_int4_g128_8x16", "12.6.85")
    assert 0 < kernel["occupancy"] <= 1
    row = next(line for line in done.output.splitlines() if "nbits_int4_g128_8x16" in line)
    assert f" {kernel['registers']} " in row and f"{kernel['occupancy']:.0%}" in row
    assert "compiled, not run" in done.output


def test_ops_beside_it_are_refused() -> None:
    done = CliRunner().invoke(main, ["kernels", "matmul", "--cubins"])
    assert done.exit_code == 2
    assert "--cubins: expected no OPS beside it, got matmul" in done.output
