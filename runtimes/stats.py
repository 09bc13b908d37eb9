"""What a generation cost: times, rates and memory."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpm_edge.runtimes.sparsity import MlpSparsity


class Clock:
    """Seconds since it was made, on a clock that never goes back."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


@dataclass
class Stats:
    """Measurements of one generation.

    Attributes:
        load_seconds: opening the bundle, hash check included; paid once per model.
        prompt_tokens: length of the prompt; cached_tokens: how many of them were in the cache already.
        new_tokens: tokens produced, a final end-of-sequence token included.
        ttft_seconds: from the call to the first token (time to first token).
        prefill_seconds: the forward pass over prompt_tokens - cached_tokens.
        decode_seconds: from the first token to the last.
        mlp_sparsity: what decoding left out of the MLPs, None where all is read or nothing was decoded.
        peak_rss_bytes: the most memory this process ever held, None where the system does not tell.
    """

    load_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    ttft_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    mlp_sparsity: MlpSparsity | None = None
    peak_rss_bytes: int | None = None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second, without those found in the cache."""
        fed = self.prompt_tokens - self.cached_tokens
        return fed / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time per output token after the first, None for fewer than two tokens."""
        return self.decode_seconds / (self.new_tokens - 1) if self.new_tokens > 1 else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first."""
        tpot = self.tpot_seconds
        return 1 / tpot if tpot else None

    def to_json(self) -> dict[str, Any]:
        """All fields and rates, JSON-ready."""
        return asdict(self) | {
            "prefill_tokens_per_second": self.prefill_rate,
            "tpot_seconds": self.tpot_seconds,
            "decode_tokens_per_second": self.decode_rate,
            "mlp_sparsity": self.mlp_sparsity and self.mlp_sparsity.to_json(),
        }

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with unit) pairs for a table."""
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        rows = [
            ("load time", f"{self.load_seconds:.2f} s"),
            ("prompt", f"{self.prompt_tokens} tokens{cached}"),
            ("answer", f"{self.new_tokens} tokens"),
            ("TTFT", f"{self.ttft_seconds * 1e3:.0f} ms"),
            ("TPOT", "-" if self.tpot_seconds is None else f"{self.tpot_seconds * 1e3:.1f} ms"),
            ("prefill", _rate(self.prefill_rate)),
            ("decode", _rate(self.decode_rate)),
        ]
        if self.mlp_sparsity is not None:
            rows.append(("MLP sparsity", str(self.mlp_sparsity)))
        if self.peak_rss_bytes is not None:
            rows.append(("peak memory", f"{self.peak_rss_bytes / 2**20:.0f} MiB"))
        return rows


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} tok/s"


def peak_rss() -> int | None:
    """The largest resident set of this process in bytes, or None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_peak()
    try:
        # VmHWM belongs to this program; ru_maxrss starts from the parent's size after fork and exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _windows_peak() -> int | None:
    import ctypes
    from ctypes import wintypes

    sizes = [(name, ctypes.c_size_t) for name in (
        "PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage", "QuotaPagedPoolUsage",
        "QuotaPeakNonPagedPoolUsage", "QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage",
    )]  # fmt: skip

    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS of psapi.h
        _fields_ = [("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD), *sizes]

    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    query = kernel.K32GetProcessMemoryInfo
    query.argtypes = [wintypes.HANDLE, ctypes.POINTER(Counters), wintypes.DWORD]
    if not query(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return None
    return int(counters.PeakWorkingSetSize)
