"""Who may import whom; lazy imports included, imports for type checkers not."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.source_tree import PACKAGES, ROOT, Import, imports, source_files

ENGINES = {"onnxruntime", "openvino", "openvino_tokenizers", "tensorrt", "tensorrt_rtx", "cuda"}
THIN = {"click", "jinja2", "numpy", "rich", "tokenizers"}

# What a package may import besides itself and the standard library.
ALLOWED = {
    "quant": {"numpy"},
    "plugins": {"numpy"},
    "runtimes": {"cpm_edge.plugins"} | THIN | ENGINES,
}
# More for the files of plugins that need it, by file name.
BODY = {"onnx_ir", "onnxscript"}
BODIES = ("body", "latent_body", "in_place_body", "rows_out_body")
TRITON = ("triton", "triton_append", "triton_attend", "triton_select", "triton_tiles")
PLUGIN_FILES = {f"{name}.py": BODY for name in BODIES} | {f"{name}.py": {"triton"} for name in TRITON}

FILES = [path for package in PACKAGES for path in source_files(package)]


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def offending(path: Path, found: list[Import]) -> list[str]:
    return [f"{names(path)}:{each.line} imports {each.module}" for each in found]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_keeps_to_its_imports(package: str) -> None:
    wrong = []
    for path in source_files(package):
        allowed = ALLOWED[package] | {f"cpm_edge.{package}"} | sys.stdlib_module_names
        if package == "plugins":
            allowed = allowed | PLUGIN_FILES.get(path.name, set())
        wrong += offending(path, [each for each in imports(path) if each.top not in allowed])
    assert wrong == []


def test_the_runtime_leaves_the_heavy_files_of_plugins_alone() -> None:
    heavy = tuple(name.removesuffix(".py") for name in PLUGIN_FILES)
    for path in source_files("runtimes"):
        found = [each for each in imports(path) if each.top == "cpm_edge.plugins"]
        assert offending(path, [each for each in found if each.module.endswith(heavy)]) == []


@pytest.mark.parametrize("package", ["runtimes", "exporter"])
def test_optional_packages_are_imported_where_they_are_used(package: str) -> None:
    optional = ENGINES | {"transformers", "triton"}
    for path in source_files(package):
        eager = [each for each in imports(path) if each.top in optional and not each.lazy]
        assert offending(path, eager) == []


@pytest.mark.parametrize("package", [p for p in PACKAGES if p != "benchmarks"])
def test_nobody_imports_the_benchmarks_but_the_exporter_its_plan(package: str) -> None:
    for path in source_files(package):
        found = [each for each in imports(path) if each.top == "cpm_edge.benchmarks"]
        if package == "exporter":
            found = [each for each in found if not each.module.startswith("cpm_edge.benchmarks.plan")]
        assert offending(path, found) == []


def test_the_plan_is_a_leaf() -> None:
    allowed = {"numpy", "cpm_edge.benchmarks"} | sys.stdlib_module_names
    for path in (ROOT / "benchmarks/plan").rglob("*.py"):
        found = imports(path)
        asked = {"openvino"} if path.name == "detect.py" else set()  # for the processor's name
        assert offending(path, [each for each in found if each.top not in allowed | asked]) == []
        own = [each for each in found if each.top == "cpm_edge.benchmarks"]
        assert all(each.module.startswith("cpm_edge.benchmarks.plan") for each in own)


def test_imports_are_absolute() -> None:
    for path in FILES:
        assert offending(path, [each for each in imports(path) if each.module.startswith(".")]) == []


@pytest.mark.parametrize("package", ["benchmarks", "plugins", "quant", "runtimes"])
def test_what_runs_on_a_device_is_python_3_10(package: str) -> None:
    for path in source_files(package):
        ast.parse(path.read_text(encoding="utf-8"), filename=names(path), feature_version=(3, 10))


def test_the_walker_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import numpy.typing as npt\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "from cpm_edge import quant\n"
        "ENGINE = 'cpm_edge.runtimes.ort'\n"
        "def load():\n    import openvino.opset15\n    return f'cpm_edge.exporter.targets.{ENGINE}'\n"
        "class A:\n    import json\n"
    )
    assert [(each.top, each.lazy) for each in imports(path) if each.top != "typing"] == [
        ("numpy", False),
        ("cpm_edge", False),
        ("cpm_edge.quant", False),
        ("cpm_edge.runtimes", True),
        ("openvino", True),
        ("cpm_edge.exporter", True),
        ("json", False),
    ]
