"""The whole subcommand on a tiny shape; the numbers mean nothing, their places do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm_edge.benchmarks.kernels import matmul
from cpm_edge.benchmarks.kernels.machine_limits import Limits
from tests.benchmarks.shapes import bench, write_shape
from tests.support.checkpoints import VARIANTS

COMMON = ("--rows", 40, "--context", "40,300", "--positions", "1,600", "--repeat", 1, "--threads", 1)


def test_every_op(tmp_path: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "WALK_BYTES", 1 << 16)
    shape = write_shape(tmp_path, sparse_config=VARIANTS["sparse"]["sparse_config"])
    sizes = ("--heads", 2, "--size", 16)
    result = bench("kernels", "--shape", shape, *COMMON, *sizes, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert set(results) == {"matmul", "attention", "linear_attention", "limits"}
    assert all(len(each["gemv_seconds"]) == 1 and each["gemm_rows"] == 40 for each in results["matmul"])
    assert [each["context"] for each in results["attention"]] == [40, 300]
    for each in results["attention"]:
        assert each["sparse"]["decode_seconds"][0] > 0 and each["dense"]["prefill_seconds"][0] > 0
    assert set(results["linear_attention"]["prefill_seconds"]) == {"ours", "onnxruntime"}
    assert set(results["linear_attention"]["decode_seconds"]) == {"1", "600"}
    assert "20.0 GB/s" in result.output and "100 GFLOP/s" in result.output


def test_one_op(tmp_path: Path, limits: Limits) -> None:
    file = tmp_path / "out.json"
    result = bench("kernels", "attention", "--shape", write_shape(tmp_path), *COMMON, "--json", file)
    assert result.exit_code == 0, result.output
    assert set(json.loads(file.read_text())["results"]) == {"attention", "limits"}
    assert bench("kernels", "convolution").exit_code == 2


def test_warnings_are_one_clean_line(tmp_path: Path, limits: Limits) -> None:
    shape = write_shape(tmp_path, mystery=1)
    result = bench("kernels", "linear-attention", "--shape", shape, *COMMON, "--heads", 2, "--size", 16)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "mystery" in line]
    assert told == ["warning: config.json: keys without effect here: mystery"]
