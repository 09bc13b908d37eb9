"""How the native libraries are compiled; setup.py runs it, and ``make sanitize`` with other flags.

Needs a C++17 compiler and nothing else: every instruction set is one source file with its own flags, chosen
among at run time.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
KERNELS = "cpm_kernels"
OPENVINO = "cpm_openvino"

GNU_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"]
# Contraction would give the scalar path other roundings than the vector paths.
GNU_FLAGS += ["-ffp-contract=off", "-pthread"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/EHsc", "/W4", "/fp:precise"]
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]

# File name ending to (GNU flags, MSVC flags).
ISA_FLAGS = {
    "_avx2": (["-mavx2", "-mfma", "-mf16c"], ["/arch:AVX2"]),
    "_avxvnni": (["-mavx2", "-mfma", "-mf16c", "-mavxvnni"], ["/arch:AVX2"]),
    "_avx512vnni": (
        ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512vnni"],
        ["/arch:AVX512"],
    ),
}


def sources(x86: bool) -> list[Path]:
    """The kernels and their C API; on other processors without the x86 instruction sets."""
    found = [ROOT / "capi.cpp", *sorted((ROOT / "kernels").glob("*.cpp"))]
    return [path for path in found if x86 or not any(path.stem.endswith(isa) for isa in ISA_FLAGS)]


def build_kernels(compiler: Any, work: Path, output: Path, *, sanitize: bool = False) -> Path:
    """Compile and link the kernel library.

    Args:
        compiler: setuptools' compiler object, customized for this platform.
        work: folder for object files.
        output: folder for the library.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    msvc = compiler.compiler_type == "msvc"
    base = MSVC_FLAGS if msvc else GNU_FLAGS + (SANITIZE if sanitize else [])
    macros = [("CPM_X86", "1")] if x86 else []
    objects: list[str] = []
    for source in sources(x86):
        isa = next((flags for ending, flags in ISA_FLAGS.items() if source.stem.endswith(ending)), ([], []))
        objects += compiler.compile(
            [os.path.relpath(source)],
            output_dir=str(work),
            macros=macros,
            include_dirs=[str(ROOT)],
            extra_postargs=[*base, *isa[1 if msvc else 0]],
        )
    link = [] if msvc else ["-pthread", *(SANITIZE if sanitize else [])]
    name = f"{KERNELS}.dll" if msvc else f"lib{KERNELS}.so"
    compiler.link_shared_object(
        objects, str(output / name), output_dir=None, extra_postargs=link, target_lang="c++"
    )
    return output / name


def build_openvino(compiler: Any, work: Path, output: Path, package: Path) -> Path:
    """Compile the OpenVINO extension against the installed package; it loads the kernels that lie beside it.

    Args:
        package: folder of the ``openvino`` Python package, which ships headers and libraries.
    """
    objects = compiler.compile(
        [os.path.relpath(path) for path in sorted((ROOT / "openvino").glob("*.cpp"))],
        output_dir=str(work),
        include_dirs=[str(ROOT), str(package / "include")],
        extra_postargs=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
    )
    # The names carry the exact version: an extension fits the openvino that it was built against.
    libraries = [
        next((package / "libs").glob(f"lib{name}.so.*")) for name in ("openvino", "openvino_onnx_frontend")
    ]
    compiler.link_shared_object(
        [*objects, *map(str, libraries)],
        str(output / f"lib{OPENVINO}.so"),
        output_dir=None,
        library_dirs=[str(output)],
        libraries=[KERNELS],
        extra_postargs=["-Wl,-rpath,$ORIGIN"],
        target_lang="c++",
    )
    return output / f"lib{OPENVINO}.so"
