"""The GPU under TensorRT: compute capability, memory, and what kind of machine holds it."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from cpm_edge.runtimes.cuda_runtime import Cuda, size

_ROOT = Path("/")
# Major release of L4T (Linux for Tegra) and the JetPack it belongs to.
_JETPACKS = {"35": "5", "36": "6", "38": "7", "39": "7"}


@dataclass(frozen=True)
class Device:
    """A GPU and the memory beside it.

    Attributes:
        name: of the board where it is a Jetson, of the GPU elsewhere.
        sm: compute capability, 87 for 8.7.
        total: bytes of the memory the GPU uses; available: of them, free for us now.
        host_available: bytes of main memory free for us now.
        unified: GPU and CPU share one memory, so both numbers are about the same bytes.
        l4t: release of a Jetson's Linux such as "36.4.3", None elsewhere.
    """

    name: str
    sm: int
    total: int
    available: int
    host_available: int
    unified: bool
    l4t: str | None = None

    @property
    def jetpack(self) -> str | None:
        """Major version of JetPack, None where it is unknown."""
        return _JETPACKS.get(self.l4t.split(".")[0]) if self.l4t else None

    def __str__(self) -> str:
        system = f", L4T {self.l4t}" if self.l4t else ""
        if self.jetpack:
            system += f" (JetPack {self.jetpack})"
        kind = "shared" if self.unified else "device"
        return f"{self.name}, SM {self.sm}{system}, {size(self.total)} {kind} memory"


def detect_device(cuda: Cuda, root: Path = _ROOT) -> Device:
    """Ask CUDA and the system about device 0.

    Args:
        root: where /proc, /sys and /etc are; another one is for tests.
    """
    major = cuda.attribute("cudaDevAttrComputeCapabilityMajor")
    minor = cuda.attribute("cudaDevAttrComputeCapabilityMinor")
    unified = bool(cuda.attribute("cudaDevAttrIntegrated"))
    free, total = cuda.memory()
    host = available_memory(root)
    if unified:
        # CUDA does not count what the page cache gives back on demand; where the system does not say, CUDA's.
        free = host = host or free
    return Device(
        name=board_name(root) or _gpu_name(cuda),
        sm=10 * major + minor,
        total=total,
        available=free,
        host_available=free if host is None else host,
        unified=unified,
        l4t=l4t_release(root),
    )


def l4t_release(root: Path = _ROOT) -> str | None:
    """Release of a Jetson's Linux from /etc/nv_tegra_release, None on other machines."""
    text = _read(root / "etc/nv_tegra_release")
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else None


def board_name(root: Path = _ROOT) -> str | None:
    """Name of the board from the device tree, None where there is none or it is not NVIDIA's."""
    name = _read(root / "proc/device-tree/model").strip("\0 \n")
    return name if "NVIDIA" in name.upper() or "JETSON" in name.upper() else None


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes that programs can still have (MemAvailable), None where the system does not say."""
    if sys.platform == "win32":
        return _windows_memory()
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _windows_memory() -> int | None:
    # MEMORYSTATUSEX of sysinfoapi.h: length and load in 32 bits each, then ullTotalPhys, ullAvailPhys, ...
    status = (ctypes.c_uint64 * 8)(ctypes.sizeof(ctypes.c_uint64) * 8)
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    return int(status[2]) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _gpu_name(cuda: Cuda) -> str:
    name = cuda.call("cudaGetDeviceProperties", 0).name
    return name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
