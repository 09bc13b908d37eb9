"""The native kernel library, loaded once and called through ctypes.

CPM_EDGE_KERNELS names another library file, for sanitizer builds.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

ABI_VERSION = 3
_NAMES = ("libcpm_kernels.so", "cpm_kernels.dll")
_EXTENSIONS = ("libcpm_openvino.so", "cpm_openvino.dll")
_NO_KERNELS = "the native kernels were not built: no C++ compiler was at hand when cpm-edge was installed"
# What repairs every NativeError about the libraries themselves.
REBUILD = (
    "install a C++17 compiler and openvino, then in the folder of cpm-edge's sources: "
    "pip install --force-reinstall --no-deps --no-build-isolation ."
)


class Isa(enum.IntEnum):
    """Instruction sets with kernels of their own."""

    SCALAR = 0
    AVX2 = 1
    AVXVNNI = 2
    AVX512VNNI = 3


class NativeError(RuntimeError):
    """The library is missing, of another version, or refused a call."""


def library_path() -> Path | None:
    """The library that would be loaded, None when it was not built."""
    named = os.environ.get("CPM_EDGE_KERNELS")
    if named:
        return Path(named)
    folder = Path(__file__).parent / "lib"
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def extension_path() -> Path:
    """The OpenVINO extension, which lies beside the kernels.

    Raises:
        NativeError: it, or the kernels, were not built.
    """
    kernels = library_path()
    if kernels is None:
        raise NativeError(_NO_KERNELS)
    found = next((kernels.parent / name for name in _EXTENSIONS if (kernels.parent / name).is_file()), None)
    if found is None:
        raise NativeError(
            "the OpenVINO extension was not built: openvino was not at hand when cpm-edge was installed"
        )
    return found


def load_extension(core: Any) -> None:
    """Teach an ``openvino.Core`` the cpm ops.

    Raises:
        NativeError: the extension or the kernels are missing, or do not fit this openvino.
    """
    path = extension_path()
    library()
    try:
        core.add_extension(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("This error happened: ")[2]
        raise NativeError(f"{path.name} cannot be loaded: {reason}") from error


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        NativeError: it was not built, cannot be loaded, or has another ABI version.
    """
    path = library_path()
    if path is None:
        raise NativeError(_NO_KERNELS)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"{path.name} cannot be loaded: {error}") from error
    loaded.cpm_abi_version.restype = ctypes.c_int32
    version = loaded.cpm_abi_version()
    if version != ABI_VERSION:
        raise NativeError(f"{path.name}: expected ABI version {ABI_VERSION}, got {version}")
    loaded.cpm_error_text.restype = ctypes.c_char_p
    loaded.cpm_error_text.argtypes = [ctypes.c_int32]
    loaded.cpm_pool_create.restype = ctypes.c_void_p
    loaded.cpm_pool_create.argtypes = [ctypes.c_int32]
    for name in ("cpm_pool_destroy", "cpm_pool_begin_step", "cpm_pool_end_step"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p]
        getattr(loaded, name).restype = None
    return loaded


def check(status: int, what: str) -> None:
    """Raise NativeError for a status other than 0."""
    if status:
        raise NativeError(f"{what}: {library().cpm_error_text(status).decode()}")


def best_isa() -> Isa:
    """The instruction set that the kernels use on this machine."""
    return Isa(library().cpm_best_isa())


def available_isas() -> list[Isa]:
    """Every instruction set that this machine can run."""
    return [isa for isa in Isa if library().cpm_has_isa(int(isa))]


class Handle:
    """A native object with threads of its own, destroyed once: by close, garbage collection or at exit.

    Threads do not survive a fork, so a forked child can neither use the object nor destroy it.

    Args:
        address: what the library's create function returned.
        destroy: the library's function that joins the threads and frees the object.
        name: what messages call it.
    """

    def __init__(self, address: int, destroy: Callable[[ctypes.c_void_p], None], name: str) -> None:
        self._address = address
        self._name = name
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._destroy = weakref.finalize(self, _destroy, destroy, address, self._owner, self._lock)

    @property
    def is_open(self) -> bool:
        return self._destroy.alive

    @property
    def address(self) -> int:
        """The object's address.

        Raises:
            NativeError: the object is closed, or this process is a fork of the one that made it.
        """
        if os.getpid() != self._owner:
            raise NativeError(
                f"the {self._name} belongs to process {self._owner}, of which this one is a fork: "
                "its threads stayed there"
            )
        if not self.is_open:
            raise NativeError(f"the {self._name} is closed")
        return self._address

    @contextlib.contextmanager
    def in_use(self) -> Iterator[ctypes.c_void_p]:
        """Hold the object open: a close from another thread waits until the block ends."""
        with self._lock:
            yield ctypes.c_void_p(self.address)

    def close(self) -> None:
        """Destroy the object. Closing twice is harmless."""
        self._destroy()


def _destroy(
    destroy: Callable[[ctypes.c_void_p], None], address: int, owner: int, lock: threading.RLock
) -> None:
    # In a fork, joining threads that do not exist would wait forever.
    if os.getpid() == owner:
        with lock:
            destroy(ctypes.c_void_p(address))


class ThreadPool:
    """Worker threads that native calls share; a context manager that joins them.

    Args:
        threads: in all, the calling thread included.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._owned = Handle(library().cpm_pool_create(threads), library().cpm_pool_destroy, "thread pool")

    @property
    def handle(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._owned.address)

    def close(self) -> None:
        """Stop and join the workers; no call may be using them."""
        self._owned.close()

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pointer(array: npt.NDArray[Any] | None, dtype: npt.DTypeLike) -> ctypes.c_void_p | None:
    """The address of a C-contiguous array of the expected type.

    Raises:
        NativeError: it has another type or gaps between its elements.
    """
    if array is None:
        return None
    if array.dtype != np.dtype(dtype) or not array.flags.c_contiguous:
        raise NativeError(f"expected a C-contiguous {np.dtype(dtype)} array, got {array.dtype} {array.shape}")
    return ctypes.c_void_p(array.ctypes.data)
