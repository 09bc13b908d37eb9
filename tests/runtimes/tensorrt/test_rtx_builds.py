"""The builder on the real TensorRT-RTX, which needs no GPU; opening and running an engine needs one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.source_tree import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All builds at once: importing the library takes longer than a build."""
    folder = tmp_path_factory.mktemp("rtx")
    command = [sys.executable, "-m", "tests.runtimes.tensorrt.rtx_builds", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "timings").stat().st_size > 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_graphs_of_the_contract_build_for_two_chips(results: dict[str, Any]) -> None:
    assert results["two chips"]["bytes"] > results["one chip"]["bytes"] > 10_000
    for name in ("large", "token ids", "streamed", "timings", "in place"):
        assert results[name]["bytes"] > 10_000


def test_weights_as_inputs_leave_the_engine(results: dict[str, Any]) -> None:
    weights = results["inputs"]["weights"]
    assert {"positions", "q", "k", "v", "o", "rq", "head"} <= set(weights)
    matrices = 2 * 4096 * (64 + 64 + 32 + 32 + 64 + 4 * 16 + 61)
    assert results["large"]["bytes"] - results["inputs"]["bytes"] > 0.9 * matrices


def test_a_chip_it_does_not_know_is_refused(results: dict[str, Any]) -> None:
    assert results["orin"]["error"] == "BackendError"
    assert "compute capability of [75, 80, 86, 89" in results["orin"]["message"]
    assert results["orin"]["message"].endswith("got 87")


def test_the_parsers_words_reach_the_user(results: dict[str, Any]) -> None:
    found = results["unknown operator"]
    assert found["error"] == "BundleError"
    assert "cannot parse model.onnx:\n  CpmSparseAttention 'Softmax_" in found["message"]
    assert "plugin" in found["message"].lower()
    assert "--flavour stock" in found["hint"]


def test_a_position_in_a_shape_is_refused(results: dict[str, Any]) -> None:
    assert results["shape from position"]["message"].startswith("input past_length: its values decide shapes")


def test_dynamic_dimensions_of_other_inputs_are_refused(results: dict[str, Any]) -> None:
    assert results["another dynamic input"]["message"].startswith(
        "input past_key_values.0.key: expected a static"
    )
