"""Resident memory of this process, by kind and by mapped file."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_KINDS = {"RssAnon": "anonymous", "RssFile": "mapped files", "RssShmem": "shared"}


def resident_bytes() -> dict[str, int]:
    """Bytes in memory now, by kind; empty where the system does not tell."""
    lines = _read("/proc/self/status")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {_KINDS[name]: int(value.split()[0]) * 1024 for name, value in pairs if name in _KINDS}


def resident_of_file(name: str) -> int:
    """Bytes in memory of mapped files called ``name``; 0 where the system does not tell."""
    total, inside = 0, False
    for line in _read("/proc/self/smaps"):
        first = line.split(" ", 1)[0]
        if not first.endswith(":"):  # a mapping's first line: its address range
            inside = line.endswith(f"/{name}")
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def return_freed_memory() -> None:
    """Ask the C library to give freed memory back to the system; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
