"""The metadata is in setup.cfg; here are the native libraries.

They need a C++17 compiler and nothing else: every instruction set is one source file with its own flags,
chosen among at run time. With CPM_EDGE_SANITIZE=1 they are built with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("plugins/csrc")
FOLDER = "cpm_edge.plugins.lib"
# Optional: without a compiler the install goes on, and the runtime says what is lost.
KERNELS = Extension(f"{FOLDER}.cpm_kernels", sources=[], optional=True)
OPENVINO = Extension(f"{FOLDER}.cpm_openvino", sources=[], optional=True)

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Contraction would give the scalar path other roundings than the vector paths.
GNU = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]
MSVC = ["/std:c++17", "/O2", "/EHsc", "/W4", "/fp:precise"]
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
# Ending of a source file to its (GNU, MSVC) flags.
ISA = {
    "_avx2": (["-mavx2", "-mfma", "-mf16c"], ["/arch:AVX2"]),
    "_avxvnni": (["-mavx2", "-mfma", "-mf16c", "-mavxvnni"], ["/arch:AVX2"]),
    "_avx512vnni": (
        ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512vnni"],
        ["/arch:AVX512"],
    ),
}


class BuildNative(build_ext):
    """Builds plain shared libraries, loaded by path: no Python API in them."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        file = f"{name}.dll" if os.name == "nt" else f"lib{name}.so"
        return os.path.join(*folders, file)  # noqa: PTH118 - setuptools wants a string

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        if ext is KERNELS:
            self._build_kernels(output)
            return
        found = importlib.util.find_spec("openvino")
        if found is None or found.origin is None:
            print("openvino is not installed: its extension is left out")
        else:
            self._build_openvino(output, Path(found.origin).parent)

    @property
    def _msvc(self) -> bool:
        return str(self.compiler.compiler_type) == "msvc"

    def _flags(self) -> list[str]:
        if self._msvc:
            return MSVC
        return GNU + (SANITIZE if os.environ.get("CPM_EDGE_SANITIZE") else [])

    def _build_kernels(self, output: Path) -> None:
        objects: list[str] = []
        for source in [SOURCES / "capi.cpp", *sorted((SOURCES / "kernels").glob("*.cpp"))]:
            isa = next((flags for ending, flags in ISA.items() if source.stem.endswith(ending)), None)
            if isa is not None and not X86:
                continue
            objects += self.compiler.compile(
                [str(source)],
                output_dir=self.build_temp,
                macros=[("CPM_X86", "1")] if X86 else [],
                include_dirs=[str(SOURCES)],
                extra_postargs=[*self._flags(), *(isa[self._msvc] if isa else [])],
            )
        # With a name of its own the extension finds it beside itself, wherever both were built.
        self._link(objects, output, [f"-Wl,-soname,{output.name}"])

    def _build_openvino(self, output: Path, package: Path) -> None:
        """Compile against the installed openvino, whose package ships headers and libraries.

        The names of its libraries carry the exact version: the extension fits no other.
        """
        objects = self.compiler.compile(
            [str(path) for path in sorted((SOURCES / "openvino").glob("*.cpp"))],
            output_dir=self.build_temp,
            include_dirs=[str(SOURCES), str(package / "include")],
            extra_postargs=self._flags(),
        )
        names = ("openvino", "openvino_onnx_frontend")
        libraries = [str(next((package / "libs").glob(f"lib{name}.so.*"))) for name in names]
        kernels = str(output.parent / Path(self.get_ext_filename(KERNELS.name)).name)
        self._link([*objects, *libraries, kernels], output, ["-Wl,-rpath,$ORIGIN"])

    def _link(self, objects: list[str], output: Path, flags: list[str] | None = None) -> None:
        sanitize = SANITIZE if os.environ.get("CPM_EDGE_SANITIZE") else []
        extra = [] if self._msvc else ["-pthread", *sanitize, *(flags or [])]
        self.compiler.link_shared_object(
            objects, str(output), output_dir=None, extra_postargs=extra, target_lang="c++"
        )


setup(ext_modules=[KERNELS, OPENVINO], cmdclass={"build_ext": BuildNative})
