from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from cpm_edge.plugins import native
from tests.bad_input.bench import Bench
from tests.support.bundles import NATIVE, Bundles


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


def without_native_libraries(monkeypatch: pytest.MonkeyPatch, folder: Path, *files: str) -> None:
    """As after an install that built only these; they hold no library."""
    for name in files:
        (folder / name).write_bytes(b"not a library")
    path = folder / "libcpm_kernels.so"
    monkeypatch.setattr(native, "library_path", lambda: path if path.exists() else None)
    native.library.cache_clear()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "native kernels were not built: no C++ compiler"),
        (("libcpm_kernels.so",), "OpenVINO extension was not built: openvino was not at hand"),
        (("libcpm_kernels.so", "libcpm_openvino.so"), "libcpm_kernels.so cannot be loaded"),
    ],
    ids=["nothing", "no extension", "damaged"],
)
def test_native_bundles_without_the_native_libraries(
    bench: Bench,
    bundles: Bundles,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    files: tuple[str, ...],
    words: str,
) -> None:
    made = bundles.open("sparse", "aipc", **NATIVE).path
    without_native_libraries(monkeypatch, tmp_path_factory.mktemp("lib"), *files)
    command = "pip install --force-reinstall --no-deps --no-build-isolation ."
    bench.run_fails(made).says(words, hint=command)
    bench.export_fails("--flavour", "native", target="aipc").says("--flavour native", words, hint=command)
    stock = bench.export("--max-context", "64", target="aipc")
    assert stock.exit_code == 0
    assert bench.run(bench.output).exit_code == 0
    native.library.cache_clear()


def test_an_extension_for_another_openvino(
    bench: Bench, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundles.open("sparse", "aipc", **NATIVE).path
    real = native.library_path()
    assert real is not None
    folder = tmp_path_factory.mktemp("lib")
    shutil.copy(real, folder / "libcpm_kernels.so")
    (folder / "libcpm_openvino.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "library_path", lambda: folder / "libcpm_kernels.so")
    bench.run_fails(made).says("libcpm_openvino.so cannot be loaded", hint="--flavour stock")
