"""cpm-run on bundles whose engine is built on the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cpm_edge.runtimes.cli import main
from tests.runtimes.fakes import make_bundle
from tests.runtimes.tensorrt.conftest import Board, MakeBundle, put_in_place
from tests.runtimes.tensorrt.fake_cuda import FakeCuda
from tests.runtimes.tensorrt.tiny_model import TinyModel


def test_build_only_builds_keeps_and_reports(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = str(tiny_bundle(TinyModel()).path)
    first = CliRunner().invoke(main, [bundle, "--build-only"])
    assert first.exit_code == 0, first.output
    assert first.output.startswith("engine: ") and "built in" in first.output
    assert "there already" in CliRunner().invoke(main, [bundle, "--build-only"]).output
    report = json.loads(CliRunner().invoke(main, [bundle, "--build-only", "--json"]).output)
    assert report["new"] is False and report["placement"] == "engine" and report["nbytes"] > 1000
    assert board.tensorrt.builds == 1
    assert board.cuda.live == 0


def test_build_only_with_a_prompt_is_a_usage_error(tiny_bundle: MakeBundle) -> None:
    result = CliRunner().invoke(main, ["bundle", "--build-only", "--prompt", "x"])
    assert result.exit_code == 2


def test_a_bundle_without_anything_to_build_says_so(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "ort")
    result = CliRunner().invoke(main, [str(folder), "--build-only"])
    assert result.exit_code == 1
    assert "error: target ort: there is no engine to build" in result.output


def test_the_default_device_of_a_jetson_bundle_is_cuda(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = str(tiny_bundle(TinyModel()).path)
    # The tokenizer has more ids than the tiny model: the engine is reached, the prompt is not understood.
    refused = CliRunner().invoke(main, [bundle, "--prompt", "hi", "--raw", "--device", "CPU"])
    assert "device: expected cuda for a jetson bundle, got CPU" in refused.output
    assert board.tensorrt.builds == 0
    CliRunner().invoke(main, [bundle, "--prompt", "hi", "--raw"])
    assert board.tensorrt.builds == 1


@pytest.mark.parametrize("options", [["--prompt", "hi"], ["--build-only"]])
def test_a_machine_without_a_gpu_is_one_error(
    options: list[str], board: Board, tiny_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch, FakeCuda(count=0))
    result = CliRunner().invoke(main, [str(tiny_bundle(TinyModel()).path), *options])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: no NVIDIA GPU can be used on this machine: ")
    assert lines[1].startswith("hint: ")
