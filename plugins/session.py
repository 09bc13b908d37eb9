"""A native session: the threads and caches that the graph ops of one sequence use."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.native import NativeError, check, library, pointer

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


class _Cache(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("pooled", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
    )


class NativeSession:
    """Owns a cpm_session; the cache arrays stay the caller's and must outlive their use.

    Args:
        threads: worker threads, the calling thread included.
        layers: attention layers that have a cache.
    """

    def __init__(self, threads: int, layers: int) -> None:
        create = library().cpm_session_create
        create.restype = ctypes.c_void_p
        self._handle: int | None = create(ctypes.c_int32(threads), ctypes.c_int32(layers))
        library().cpm_session_pool.restype = ctypes.c_void_p

    @property
    def address(self) -> int:
        """What a graph's ``session`` input takes."""
        if self._handle is None:
            raise NativeError("the native session is closed")
        return self._handle

    def set_cache(self, layer: int, key: Halves, value: Halves, pooled: Floats | None) -> None:
        """Let the ops of a layer use these buffers: keys and values (kv heads, capacity, head size)."""
        cache = _Cache(
            pointer(key, np.float16), pointer(value, np.float16), pointer(pooled, np.float32), key.shape[1]
        )
        status = library().cpm_session_set_cache(
            ctypes.c_void_p(self.address), ctypes.c_int32(layer), ctypes.byref(cache)
        )
        check(status, "cpm_session_set_cache")

    def begin_step(self) -> None:
        """Keep the workers awake until ``end_step``."""
        library().cpm_pool_begin_step(self._pool())

    def end_step(self) -> None:
        library().cpm_pool_end_step(self._pool())

    def close(self) -> None:
        """Stop and join the workers."""
        if self._handle is not None:
            library().cpm_session_destroy(ctypes.c_void_p(self._handle))
            self._handle = None

    def _pool(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(library().cpm_session_pool(ctypes.c_void_p(self.address)))
