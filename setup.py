"""The metadata is in setup.cfg; here are the native libraries."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARY = "cpm_edge.plugins.lib.cpm_kernels"


def _recipe() -> Any:
    spec = importlib.util.spec_from_file_location("build_recipe", Path("plugins/csrc/build.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds plain shared libraries, loaded by path: no Python API in them."""

    def get_ext_filename(self, fullname: str) -> str:
        name = "cpm_kernels.dll" if os.name == "nt" else "libcpm_kernels.so"
        return os.path.join(*fullname.split(".")[:-1], name)  # noqa: PTH118 - setuptools wants a string

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).parent
        output.mkdir(parents=True, exist_ok=True)
        _recipe().build_kernels(self.compiler, Path(self.build_temp), output)


# Optional: without a compiler the install goes on, and the runtime says what is lost.
setup(ext_modules=[Extension(LIBRARY, sources=[], optional=True)], cmdclass={"build_ext": BuildNative})
