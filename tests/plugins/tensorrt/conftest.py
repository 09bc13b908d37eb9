"""Built once a session: the C++ programs and the kernels of all cases, laid out as in a bundle."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from cpm_edge.exporter.cubins.compile import compile_cubins
from cpm_edge.plugins.tensorrt_library import library
from tests.plugins.tensorrt.cases import KERNELS
from tests.plugins.tensorrt.harness import Device, Tools, build_tools, require_library


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cubins of all cases and their index."""
    require_library(platform.machine())
    folder = tmp_path_factory.mktemp("cubins")
    compile_cubins(folder, 87, KERNELS)
    return folder


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    require_library(platform.machine())
    return build_tools(tmp_path_factory.mktemp("tools"), "g++")


@pytest.fixture
def device(tools: Tools, kernels: Path, tmp_path: Path) -> Device:
    """This machine with the bundle's plugins."""
    return make_device(tools, platform.machine(), kernels, tmp_path)


def make_device(tools: Tools, machine: str, kernels: Path, folder: Path) -> Device:
    """A bundle's plugins in ``folder``."""
    path = shutil.copy(library(machine), folder / "libcpm_tensorrt.so")
    shutil.copytree(kernels, folder / "kernels")
    return Device(tools, Path(path), folder / "record.json")
