"""setup.cfg against the tree: packages, extras, and that what is imported is asked for."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from tests.source_tree import PACKAGES, ROOT, imports, source_files

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
OPTIMUM = ROOT / "exporter/optimum_register"
# Run by its path in a venv of NNCF's own.
ELSEWHERE = {ROOT / "benchmarks/calibration/nncf_child.py"}

# Import name to distribution name, where they differ.
DISTRIBUTIONS = {
    "cuda": "cuda-bindings",
    "google": "protobuf",
    "huggingface-hub": "huggingface_hub",
    "ml-dtypes": "ml_dtypes",
}


def lines(section: str, option: str) -> list[str]:
    return [line.strip() for line in CONFIG[section][option].splitlines() if line.strip()]


def requirements(extra: str | None = None) -> set[str]:
    """Names of the required distributions, as written."""
    section, option = ("options.extras_require", extra) if extra else ("options", "install_requires")
    found = (re.match(r"[\w.-]+", line) for line in lines(section, option))
    return {match.group().replace("_", "-") for match in found if match}


def package_folder(package: str) -> Path:
    """Where a package lies, by the longest prefix in package_dir."""
    pairs = [line.split("=") for line in lines("options", "package_dir")]
    folders = {name.strip(): folder.strip() for name, folder in pairs}
    prefix = max((name for name in folders if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT / folders[prefix] / package.removeprefix(prefix).strip(".").replace(".", "/")


def test_every_package_of_the_tree_is_listed() -> None:
    listed = [package_folder(package) for package in lines("options", "packages")]
    existing = {path.parent for package in PACKAGES for path in source_files(package)}
    assert len(set(listed)) == len(listed)
    assert set(listed) == existing


def test_packages_are_packages_and_the_namespace_of_optimum_is_not_one() -> None:
    for package in lines("options", "packages"):
        is_own = package.startswith("cpm_edge.")
        assert (package_folder(package) / "__init__.py").exists() is is_own, package
    assert [path.name for path in OPTIMUM.glob("*.py")] == ["cpm_edge_export.py"]


def test_every_package_is_typed() -> None:
    for package in PACKAGES:
        spec = importlib.util.find_spec(f"cpm_edge.{package}")
        assert spec is not None and spec.origin is not None
        assert Path(spec.origin).with_name("py.typed").exists()


def test_the_base_install_is_the_thin_runtime() -> None:
    assert requirements() == {"click", "jinja2", "numpy", "rich", "tokenizers"}


def test_the_extras() -> None:
    expected = {"export", "ort", "ort-gpu", "aipc", "jetson", "jetson-export", "rtx", "dev"}
    assert set(CONFIG["options.extras_require"]) == expected
    # One provides the other's module, so pip must never install both.
    assert requirements("ort") == {"onnxruntime"}
    assert requirements("ort-gpu") == {"onnxruntime-gpu"}
    # optimum itself is small; its exporters exclude each other and cap transformers.
    for extra in expected:
        assert not {"optimum-intel", "optimum-onnx"} & requirements(extra)


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("quant", []),
        ("plugins", ["export", "jetson-export"]),
        ("runtimes", ["ort", "aipc", "jetson"]),
        ("exporter", ["export", "jetson-export", "ort", "aipc", "dev"]),
        ("benchmarks", ["export", "jetson-export", "ort", "aipc", "jetson", "dev"]),
    ],
)
def test_what_is_imported_is_required(package: str, extras: list[str]) -> None:
    declared = requirements().union(*map(requirements, extras))
    files = set(source_files(package)) - ELSEWHERE
    used = {each.top for path in files for each in imports(path)}
    outside = {name for name in used if not name.startswith("cpm_edge")} - sys.stdlib_module_names
    missing = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in outside} - declared
    assert missing == set()


def test_pins_lie_within_the_ranges() -> None:
    from packaging.requirements import Requirement

    asked = [
        line for extra in CONFIG["options.extras_require"] for line in lines("options.extras_require", extra)
    ]
    ranges = [Requirement(line) for line in asked + lines("options", "install_requires")]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for pin in [Requirement(line) for line in pins if line and not line.startswith("#")]:
        version = str(pin.specifier).removeprefix("==")
        wanted = [
            each for each in ranges if each.name == pin.name and (not each.marker or each.marker.evaluate())
        ]
        assert wanted, f"{pin.name} is pinned but not required"
        assert all(each.specifier.contains(version) for each in wanted), pin.name


def test_the_version_has_one_source() -> None:
    from cpm_edge.exporter.export import VERSION

    assert VERSION == importlib.metadata.version("cpm-edge") == CONFIG["metadata"]["version"]
