"""The metadata is in setup.cfg; here are the native libraries.

The kernels need a C++17 compiler and nothing else: every instruction set is one source file with its own
flags, chosen among at run time. The extensions of OpenVINO and TensorRT need the headers of both too.
CPM_EDGE_TENSORRT_INCLUDE names the folder of NvInferRuntime.h, or several, separated as in PATH, instead of
the installed ones. CPM_EDGE_SANITIZE names sanitizers (address,undefined or thread) to build the kernels
with; the extensions are left out then, because the engines do not run under them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("plugins/csrc")
FOLDER = "cpm_edge.plugins.lib"
# Optional: without a compiler the install goes on, and the runtime says what is lost.
KERNELS = Extension(f"{FOLDER}.cpm_kernels", sources=[], optional=True)
OPENVINO = Extension(f"{FOLDER}.cpm_openvino", sources=[], optional=True)
# TensorRT plugins by the machine that they run on: aarch64 for bundles, x86-64 for tests on such a machine.
TENSORRT = {
    machine: Extension(f"{FOLDER}.cpm_tensorrt-{machine}", sources=[], optional=True)
    for machine in ("x86_64", "aarch64")
}
LINUX = sys.platform == "linux"
# The newest C library and C++ library of JetPack 6.2, which is Ubuntu 22.04.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30)}
LOSS = """
warning: cpm-edge goes on without {names}.
Lost: {lost}; all else works. To have it, install {needed}, then run:
pip install --force-reinstall --no-deps --no-build-isolation .
"""
NATIVE_LOSS = ("cpm-export --flavour native and running such bundles", "a C++17 compiler and openvino")
TENSORRT_LOSS = (
    "cpm-export --target jetson --flavour native",
    "g++, g++-aarch64-linux-gnu and nlohmann-json3-dev (apt), kernel-lens and triton (extra jetson-export)",
)

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

    def finalize_options(self) -> None:
        super().finalize_options()
        # -j N is for the sources of one library: the libraries themselves are linked with one another.
        self.compilers = self.parallel if type(self.parallel) is int else _cores()
        self.parallel = None

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
        if SANITIZERS:
            return
        self._warn([KERNELS, OPENVINO], *NATIVE_LOSS)
        if LINUX:
            self._warn([TENSORRT["aarch64"]], *TENSORRT_LOSS)

    def _warn(self, wanted: list[Extension], lost: str, needed: str) -> None:
        names = [ext.name for ext in wanted if not Path(self.get_ext_fullpath(ext.name)).exists()]
        if names:
            print(LOSS.format(names=" and ".join(names), lost=lost, needed=needed), file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # What an earlier build left must not pass for the result of one that fails.
        output.unlink(missing_ok=True)
        if ext is KERNELS:
            self._build_kernels(output)
        elif SANITIZERS:
            return
        elif ext is OPENVINO:
            found = importlib.util.find_spec("openvino")
            kernels = Path(self.get_ext_fullpath(KERNELS.name))
            if kernels.exists() and found is not None and found.origin is not None:
                self._build_openvino(output, Path(found.origin).parent, kernels)
        elif ext is TENSORRT["aarch64"] and LINUX:
            self._build_tensorrt(output, "aarch64")
        elif ext is TENSORRT["x86_64"] and LINUX and X86:
            self._build_tensorrt(output, "x86_64")

    @property
    def _msvc(self) -> bool:
        return str(self.compiler.compiler_type) == "msvc"

    def _flags(self) -> list[str]:
        if self._msvc:
            return MSVC
        return GNU + SANITIZE

    def _build_kernels(self, output: Path) -> None:
        jobs: list[tuple[Path, list[str]]] = []
        for source in [*sorted(SOURCES.glob("*.cpp")), *sorted((SOURCES / "kernels").glob("*.cpp"))]:
            isa = next((flags for ending, flags in ISA.items() if source.stem.endswith(ending)), None)
            if isa is None or X86:
                jobs.append((source, isa[self._msvc] if isa else []))
        objects = self._compile(jobs, macros=[("CPM_X86", "1")] if X86 else [])
        # With a name of its own the extension finds it beside itself, wherever both were built.
        self._link(objects, output, [f"-Wl,-soname,{output.name}"])

    def _build_openvino(self, output: Path, package: Path, kernels: Path) -> None:
        """Compile against the installed openvino, whose package ships headers and libraries.

        The names of its libraries carry the exact version: the extension fits no other.
        """
        # As system headers, whose warnings nobody here can act on.
        headers = ["/external:I" if self._msvc else "-isystem", str(package / "include")]
        objects = self._compile([(path, headers) for path in sorted((SOURCES / "openvino").glob("*.cpp"))])
        names = ("openvino", "openvino_onnx_frontend")
        libraries = [
            path for name in names for path in sorted((package / "libs").glob(f"lib{name}.so.*"))[:1]
        ]
        if len(libraries) < len(names):
            raise CompileError(f"{package / 'libs'} has no lib{names[0]}.so and lib{names[1]}.so")
        self._link([*objects, *map(str, libraries), str(kernels)], output, ["-Wl,-rpath,$ORIGIN"])

    def _build_tensorrt(self, output: Path, machine: str) -> None:
        """Compile TensorRT's plugins for one machine; neither TensorRT nor CUDA is linked."""
        compiler = _compiler(machine)
        folder = SOURCES / "tensorrt"
        command = [
            compiler,
            *("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
            *(f"-I{SOURCES}", *(f"-isystem{path}" for path in _tensorrt_includes())),
            *map(str, sorted(folder.glob("*.cpp"))),
            *("-o", str(output), "-ldl", "-pthread", "-Wl,--no-undefined"),
            *(f"-Wl,-soname,{output.name}", f"-Wl,--version-script={folder / 'exports.map'}"),
        ]
        if subprocess.run(command).returncode:
            raise CompileError(f"{compiler} failed on {folder}")
        newer = _newer_than_jetpack(output.read_bytes())
        if newer:
            output.unlink()
            raise CompileError(
                f"{compiler}: expected at most {NEWEST} of JetPack 6.2, got {', '.join(newer)}"
            )

    def _compile(
        self, jobs: list[tuple[Path, list[str]]], macros: list[tuple[str, str]] | None = None
    ) -> list[str]:
        """Object files of sources, each with further flags of its own, compiled side by side."""

        def compile_one(job: tuple[Path, list[str]]) -> list[str]:
            source, flags = job
            return self.compiler.compile(
                [str(source)],
                output_dir=self.build_temp,
                macros=macros or [],
                include_dirs=[str(SOURCES)],
                extra_postargs=[*self._flags(), *flags],
            )

        # setuptools sets MSVC up in its first call, and not for several threads.
        with ThreadPoolExecutor(1 if self._msvc else self.compilers) as pool:
            return [name for names in pool.map(compile_one, jobs) for name in names]

    def _link(self, objects: list[str], output: Path, flags: list[str] | None = None) -> None:
        extra = [] if self._msvc else ["-pthread", *SANITIZE, *(flags or [])]
        self.compiler.link_shared_object(
            objects, str(output), output_dir=None, extra_postargs=extra, target_lang="c++"
        )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compiler(machine: str) -> str:
    """The C++ compiler for a machine.

    Raises:
        CompileError: there is none.
    """
    native = machine == platform.machine()
    name = os.environ.get("CXX", "g++") if native else f"{machine}-linux-gnu-g++"
    if shutil.which(name) is None:
        raise CompileError(f"{name} is not installed")
    return name


def _tensorrt_includes() -> list[str]:
    """Folders of NvInferRuntime.h and of the CUDA headers that it includes: of wheels or of the system.

    Raises:
        CompileError: one of them is not to be found.
    """
    named = os.environ.get("CPM_EDGE_TENSORRT_INCLUDE")
    candidates = {
        "NvInferRuntime.h": [
            _in_package("kernel_lens", "include/tensorrt"),
            *Path("/usr/include").glob("*-linux-gnu"),
        ],
        "cuda.h": [_in_package("triton", "backends/nvidia/include"), Path("/usr/local/cuda/include")],
    }
    found = named.split(os.pathsep) if named else []
    for header, folders in candidates.items():
        if any((Path(folder) / header).is_file() for folder in found):
            continue
        folder = next((folder for folder in folders if folder and (folder / header).is_file()), None)
        if folder is None:
            raise CompileError(f"{header} is not installed")
        found.append(str(folder))
    return found


def _in_package(package: str, folder: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / folder if spec and spec.origin else None


def _newer_than_jetpack(library: bytes) -> list[str]:
    """Versions of the C and C++ libraries that a shared library needs and JetPack lacks."""
    needed = {match.decode() for match in re.findall(rb"\0(GLIBC(?:XX)?_[0-9.]+)(?=\0)", library)}
    versions = {each: tuple(map(int, each.partition("_")[2].split("."))) for each in needed}
    return sorted(each for each, version in versions.items() if version > NEWEST[each.partition("_")[0]])


setup(ext_modules=[KERNELS, OPENVINO, *TENSORRT.values()], cmdclass={"build_ext": BuildNative})
