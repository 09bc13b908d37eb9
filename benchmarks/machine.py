"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("cpm-edge", "numpy", "openvino", "onnxruntime", "torch", "gguf")


def describe() -> dict[str, Any]:
    """CPU model, cores, memory in bytes, system, Python and the kernels' instruction set."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "isa": _isa(),
    }


def versions() -> dict[str, str | None]:
    """Versions of the packages that a measurement may depend on, None for those not installed."""
    return {name: _version(name) for name in PACKAGES}


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Bytes of main memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _isa() -> str | None:
    from cpm_edge.plugins.native import NativeError, best_isa

    try:
        return best_isa().name.lower()
    except NativeError:
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
