"""The metadata is in setup.cfg; here are the native libraries."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "cpm_edge.plugins.lib"
KERNELS = Extension(f"{FOLDER}.cpm_kernels", sources=[], optional=True)
OPENVINO = Extension(f"{FOLDER}.cpm_openvino", sources=[], optional=True)


def _recipe() -> Any:
    spec = importlib.util.spec_from_file_location("build_recipe", Path("plugins/csrc/build.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds plain shared libraries, loaded by path: no Python API in them."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        file = f"{name}.dll" if os.name == "nt" else f"lib{name}.so"
        return os.path.join(*folders, file)  # noqa: PTH118 - setuptools wants a string

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).parent
        output.mkdir(parents=True, exist_ok=True)
        recipe, work = _recipe(), Path(self.build_temp)
        if ext is KERNELS:
            recipe.build_kernels(self.compiler, work, output)
            return
        found = importlib.util.find_spec("openvino")
        if found is None or found.origin is None:
            print("openvino is not installed: its extension is left out")
        else:
            recipe.build_openvino(self.compiler, work, output, Path(found.origin).parent)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


# Optional: without a compiler the install goes on, and the runtime says what is lost.
setup(ext_modules=[KERNELS, OPENVINO], cmdclass={"build_ext": BuildNative})
