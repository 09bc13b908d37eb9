from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.runtimes import load
from cpm_edge.runtimes.errors import BackendError, BundleError, ContextError
from tests.runtimes.fakes import FakeEngine, make_bundle

HEAVY = ["torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "openvino", "safetensors", "psutil"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces both engine modules; records what they were asked for."""
    calls: list[dict[str, Any]] = []
    for name in ("ort", "openvino.stock"):
        module = types.ModuleType(f"cpm_edge.runtimes.{name}")

        def open_engine(bundle: Any, _name: str = name, **options: Any) -> FakeEngine:
            calls.append({"module": _name, **options, "engine": FakeEngine(bundle.manifest.vocab_size)})
            return calls[-1]["engine"]  # type: ignore[no-any-return]

        module.open_engine = open_engine  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize(("target", "module"), [("ort", "ort"), ("aipc", "openvino.stock")])
def test_the_target_picks_the_engine(
    tmp_path: Path, opened: list[dict[str, Any]], target: str, module: str
) -> None:
    model = load(make_bundle(tmp_path / "b", target=target), device="GPU", threads=3, max_context=32)
    engine = opened[0].pop("engine")
    assert opened == [{"module": module, "device": "GPU", "threads": 3, "max_context": 32}]
    assert model.engine is engine
    assert model.max_context == 32
    assert model.load_seconds > 0


def test_what_load_refuses(tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    folder = make_bundle(tmp_path / "b", flavour="stock")
    with pytest.raises(ContextError, match=r"max_context: expected 1 to 64 .*, got 65"):
        load(folder, max_context=65)
    with pytest.raises(BackendError, match="threads: expected 1 to 1024, got 0"):
        load(folder, threads=0)
    with pytest.raises(BundleError, match="flavour: the bundle holds stock, asked for native"):
        load(folder, flavour="native")
    with pytest.raises(BundleError, match="target: expected one of aipc, jetson, ort, rtx, got 'abacus'"):
        load(make_bundle(tmp_path / "c", target="abacus"))
    assert opened == []
    load(folder, flavour="stock")


def test_a_bad_template_closes_the_engine_again(tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    folder = make_bundle(tmp_path / "b", {"generation_config.json": {"repetition_penalty": -1}})
    with pytest.raises(BundleError, match="repetition_penalty"):
        load(folder)
    assert opened[0]["engine"].closed


@pytest.mark.parametrize("module", ["cpm_edge.runtimes", "cpm_edge.runtimes.cli", "cpm_edge.runtimes.model"])
def test_the_runtime_is_thin(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"
