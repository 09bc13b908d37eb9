"""What this machine reads and computes at most, measured by the native library."""

from __future__ import annotations

import ctypes
import time

import numpy as np

from cpm_edge.plugins.native import ThreadPool, best_isa, library, pointer

READ_BYTES = 1 << 30
ROUNDS = 1_000_000


def read_bandwidth(threads: int, repeat: int = 5) -> float:
    """Bytes per second that ``threads`` threads read from memory: the best of some passes over 1 GiB."""
    data = np.ones(READ_BYTES, np.uint8)
    best = float("inf")
    with ThreadPool(threads) as pool:
        for _ in range(repeat):
            start = time.perf_counter()
            library().cpm_probe_read(
                pool.handle, ctypes.c_int32(best_isa()), pointer(data, np.uint8), ctypes.c_int64(READ_BYTES)
            )
            best = min(best, time.perf_counter() - start)
    return READ_BYTES / best


def multiply_adds(threads: int, repeat: int = 3) -> float:
    """float32 multiply-adds per second of ``threads`` threads at most."""
    sink = np.zeros(threads, np.float32)
    function = library().cpm_probe_multiply_add
    function.restype = ctypes.c_int64
    best = 0.0
    with ThreadPool(threads) as pool:
        for _ in range(repeat):
            start = time.perf_counter()
            count = function(
                pool.handle, ctypes.c_int32(best_isa()), ctypes.c_int64(ROUNDS), pointer(sink, np.float32)
            )
            best = max(best, count / (time.perf_counter() - start))
    return best
