"""The metadata is in setup.cfg; here are the native libraries.

They need a C++17 compiler and nothing else: every instruction set is one source file with its own flags,
chosen among at run time. CPM_EDGE_SANITIZE names sanitizers (address,undefined or thread) to build the
kernels with; the OpenVINO extension is left out then, because OpenVINO does not run under them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("plugins/csrc")
FOLDER = "cpm_edge.plugins.lib"
# Optional: without a compiler the install goes on, and the runtime says what is lost.
KERNELS = Extension(f"{FOLDER}.cpm_kernels", sources=[], optional=True)
OPENVINO = Extension(f"{FOLDER}.cpm_openvino", sources=[], optional=True)
LOSS = """
warning: cpm-edge goes on without {names}.
Lost: cpm-export --flavour native and running such bundles; all else works. To have it, install a C++17
compiler and openvino, then run: pip install --force-reinstall --no-deps --no-build-isolation .
"""

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Contraction would give the scalar path other roundings than the vector paths.
GNU = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off", "-pthread"]
MSVC = ["/std:c++17", "/O2", "/EHsc", "/W4", "/fp:precise"]
SANITIZERS = os.environ.get("CPM_EDGE_SANITIZE")
SANITIZE = (
    ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", f"-fsanitize={SANITIZERS}"]
    if SANITIZERS
    else []
)
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

    def run(self) -> None:
        super().run()
        lost = [ext for ext in (KERNELS, OPENVINO) if not Path(self.get_ext_fullpath(ext.name)).exists()]
        if lost and not SANITIZERS:
            print(LOSS.format(names=" and ".join(ext.name for ext in lost)), file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # What an earlier build left must not pass for the result of one that fails.
        output.unlink(missing_ok=True)
        if ext is KERNELS:
            self._build_kernels(output)
            return
        found = importlib.util.find_spec("openvino")
        kernels = Path(self.get_ext_fullpath(KERNELS.name))
        if kernels.exists() and found is not None and found.origin is not None and not SANITIZERS:
            self._build_openvino(output, Path(found.origin).parent, kernels)

    @property
    def _msvc(self) -> bool:
        return str(self.compiler.compiler_type) == "msvc"

    def _flags(self) -> list[str]:
        if self._msvc:
            return MSVC
        return GNU + SANITIZE

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

    def _build_openvino(self, output: Path, package: Path, kernels: Path) -> None:
        """Compile against the installed openvino, whose package ships headers and libraries.

        The names of its libraries carry the exact version: the extension fits no other.
        """
        objects = self.compiler.compile(
            [str(path) for path in sorted((SOURCES / "openvino").glob("*.cpp"))],
            output_dir=self.build_temp,
            include_dirs=[str(SOURCES)],
            # As system headers, whose warnings nobody here can act on.
            extra_postargs=[
                *self._flags(),
                "/external:I" if self._msvc else "-isystem",
                str(package / "include"),
            ],
        )
        names = ("openvino", "openvino_onnx_frontend")
        libraries = [
            path for name in names for path in sorted((package / "libs").glob(f"lib{name}.so.*"))[:1]
        ]
        if len(libraries) < len(names):
            raise CompileError(f"{package / 'libs'} has no lib{names[0]}.so and lib{names[1]}.so")
        self._link([*objects, *map(str, libraries), str(kernels)], output, ["-Wl,-rpath,$ORIGIN"])

    def _link(self, objects: list[str], output: Path, flags: list[str] | None = None) -> None:
        extra = [] if self._msvc else ["-pthread", *SANITIZE, *(flags or [])]
        self.compiler.link_shared_object(
            objects, str(output), output_dir=None, extra_postargs=extra, target_lang="c++"
        )


setup(ext_modules=[KERNELS, OPENVINO], cmdclass={"build_ext": BuildNative})
