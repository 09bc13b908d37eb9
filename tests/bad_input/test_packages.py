from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bad_input.bench import Bench
from tests.support.bundles import Bundles


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make ``import`` behave as if the packages were not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("target", "module", "extra"),
    [
        ("ort", "onnxruntime", "ort"),
        ("ort", "torch", "export"),
        ("ort", "gguf", "export"),
        ("aipc", "openvino", "aipc"),
        ("aipc", "openvino_tokenizers", "aipc"),
        ("aipc", "transformers", "export"),
    ],
)
def test_an_export_without_its_package(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target: str, module: str, extra: str
) -> None:
    hide(monkeypatch, module)
    pip = f'pip install "cpm-edge[{extra}]"'
    bench.export_fails(target=target).says(f"'{module}'", "not installed", hint=pip)


def test_one_pip_line_for_everything_that_is_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch", "openvino", "openvino_tokenizers")
    bench.export_fails(target="aipc").says("'torch'", hint='pip install "cpm-edge[aipc,export]"')


@pytest.mark.parametrize(("target", "module"), [("ort", "openvino"), ("aipc", "onnxruntime")])
def test_an_export_needs_no_other_target(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target: str, module: str
) -> None:
    hide(monkeypatch, module)
    assert bench.export(target=target).exit_code == 0


@pytest.mark.parametrize(("target", "module"), [("ort", "onnxruntime"), ("aipc", "openvino")])
def test_a_run_without_its_engine(
    bench: Bench, bundles: Bundles, monkeypatch: pytest.MonkeyPatch, target: str, module: str
) -> None:
    made: Path = bundles.result("llama", target, weight_format="int4", max_context=64).folder
    hide(monkeypatch, module)
    refusal = bench.run_fails(made)
    refusal.says(f"'{module}'", "not installed", hint=f'pip install "cpm-edge[{target}]"')


def test_a_run_needs_only_its_engine(bench: Bench, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundles.result("llama", "aipc", weight_format="int4", max_context=64).folder
    hide(monkeypatch, "onnxruntime", "openvino_tokenizers", "torch", "transformers", "onnx", "onnx_ir")
    assert bench.run(made).exit_code == 0
