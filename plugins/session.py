"""A native session: the threads and caches that the graph ops of one sequence use."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.native import Handle, check, library, pointer
from cpm_edge.plugins.sparse_attention.cache import AttentionCache
from cpm_edge.plugins.sparse_mlp.native import Sparsity


class NativeSession:
    """Owns a cpm_session; caches and states stay the caller's and must outlive their use.

    Args:
        threads: worker threads, the calling thread included.
        layers: attention layers, each of which has a cache or a state.
    """

    def __init__(self, threads: int, layers: int) -> None:
        kernels = library()
        kernels.cpm_session_create.restype = ctypes.c_void_p
        kernels.cpm_session_pool.restype = ctypes.c_void_p
        kernels.cpm_session_destroy.restype = None
        address = kernels.cpm_session_create(ctypes.c_int32(threads), ctypes.c_int32(layers))
        self._handle = Handle(address, kernels.cpm_session_destroy, "native session")

    @property
    def address(self) -> int:
        """What a graph's ``session`` input takes.

        Raises:
            NativeError: the session is closed, or this process is a fork of the one that opened it.
        """
        return self._handle.address

    def set_cache(self, layer: int, cache: AttentionCache) -> None:
        """Let the ops of a layer use the buffers of a cache of one sequence."""
        status = library().cpm_session_set_cache(
            ctypes.c_void_p(self.address), ctypes.c_int32(layer), ctypes.byref(cache.c_struct(0))
        )
        check(status, "cpm_session_set_cache")

    def set_state(self, layer: int, state: npt.NDArray[np.float32]) -> None:
        """Let the ops of a recurrent layer use this state (heads, D, D)."""
        status = library().cpm_session_set_state(
            ctypes.c_void_p(self.address), ctypes.c_int32(layer), pointer(state, np.float32)
        )
        check(status, "cpm_session_set_state")

    def sparsity(self) -> Sparsity:
        """What the ops of sparse MLPs counted so far: see plugins/sparse_mlp.

        Raises:
            NativeError: as ``address``.
        """
        function = library().cpm_session_sparsity
        function.restype = ctypes.POINTER(Sparsity)
        with self._handle.in_use() as session:
            return Sparsity.from_buffer_copy(function(session).contents)

    def in_use(self) -> contextlib.AbstractContextManager[ctypes.c_void_p]:
        """Hold the session open for a native call: see ``Handle.in_use``.

        Raises:
            NativeError: as ``address``.
        """
        return self._handle.in_use()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A run of the graph: workers stay awake, and a close from another thread waits for the end.

        Raises:
            NativeError: as ``address``.
        """
        with self._handle.in_use() as session:
            pool = ctypes.c_void_p(library().cpm_session_pool(session))
            library().cpm_pool_begin_step(pool)
            try:
                yield
            finally:
                # A signal handler may have closed the session meanwhile, in this very thread.
                if self._handle.is_open:
                    library().cpm_pool_end_step(pool)

    def close(self) -> None:
        """Stop and join the workers. Closing twice is harmless."""
        self._handle.close()
