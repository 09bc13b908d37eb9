"""Resident memory of this process, by kind."""

from __future__ import annotations

from pathlib import Path

_KINDS = {"RssAnon": "anonymous", "RssFile": "mapped files", "RssShmem": "shared"}


def resident_bytes() -> dict[str, int]:
    """Bytes in memory now, by kind; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {_KINDS[name]: int(value.split()[0]) * 1024 for name, value in pairs if name in _KINDS}
