"""``cpm-bench gpu-check``: everything but the launches on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpm_edge.benchmarks.commands.gpu_check import OPS as COMMAND_OPS
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.gpu_check import card
from cpm_edge.benchmarks.gpu_check.card import Card, find_card
from cpm_edge.benchmarks.gpu_check.case import Outcome
from cpm_edge.benchmarks.gpu_check.run import OPS
from cpm_edge.benchmarks.gpu_check.tables import markdown
from cpm_edge.exporter.cubins.toolchain import PLATFORMS
from cpm_edge.runtimes.errors import BackendError
from tests.benchmarks.shapes import bench
from tests.support.interpreted import run_interpreted


def test_cases_in_the_interpreter() -> None:
    assert run_interpreted("tests/benchmarks/gpu_check/interpreted.py") == 18


def test_without_a_gpu_one_error_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    result = bench("gpu-check", "--markdown", tmp_path / "gpu.md")
    assert result.exit_code == 1 and result.stdout == "" and not list(tmp_path.iterdir())
    error, hint = result.stderr.splitlines()
    assert error.startswith(
        "error: gpu-check: expected an NVIDIA GPU and a CUDA build of torch, got torch 2."
    )
    assert hint.startswith("hint: where there is a GPU: pip install torch --index-url")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BenchError, match="which finds no GPU") as caught:
        find_card()
    assert caught.value.hint == "run it on a machine where nvidia-smi shows a GPU"


def test_the_module_is_the_subcommand() -> None:
    command = [sys.executable, "-m", "cpm_edge.benchmarks.gpu_check", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: gpu-check [OPTIONS] [")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="'triton' is needed"):
        find_card()


def test_limits_of_known_cards() -> None:
    """H100 SXM: 989 TFLOP/s and 3.35 TB/s; GeForce RTX 4090: 165 with float32 sums and 1008 GB/s."""
    h100 = {"sm_clock_rate": 1830000, "multiprocessor_count": 132, "mem_clock_rate": 2619000}
    found = Card.of("H100", 90, h100 | {"mem_bus_width": 5120})
    assert found.tensor == pytest.approx(989e12, rel=0.01)
    assert found.bandwidth == pytest.approx(3.35e12, rel=0.01)
    ada = {"sm_clock_rate": 2520000, "multiprocessor_count": 128, "mem_clock_rate": 10501000}
    found = Card.of("RTX 4090", 89, ada | {"mem_bus_width": 384})
    assert found.tensor == pytest.approx(165e12, rel=0.01)
    assert found.bandwidth == pytest.approx(1008e9, rel=0.01)


def test_what_a_driver_does_not_say_is_left_out() -> None:
    silent = {"sm_clock_rate": 1, "multiprocessor_count": 1, "mem_clock_rate": 0, "mem_bus_width": 0}
    unknown = Card.of("Later", 200, silent)
    assert (unknown.bandwidth, unknown.tensor) == (None, None)
    outcome = Outcome("matmul", "x", 1, ["k"], 0.5, 1000, 2000, "peer", 1e-6, 1e-6)
    text = markdown(unknown, [outcome], "torch 2")
    assert text.splitlines()[0] == "Later (sm_200): its limits are not known; torch 2."
    assert text.splitlines()[-1] == "| matmul: x | 1 | 0.50 | 1.0 | 1.0 | - | 0.00 | - | peer | 1.0 | 1.00 |"


def test_tables_agree() -> None:
    assert COMMAND_OPS == OPS
    assert sorted(card.TENSOR) == sorted(PLATFORMS)
