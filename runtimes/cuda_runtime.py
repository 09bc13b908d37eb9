"""The CUDA runtime calls that sessions need, through cuda-python: each works or raises BackendError."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.runtimes.errors import BackendError

_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
_DEVICE = 0


def load_cuda() -> Cuda:
    """The CUDA runtime of this machine, with device 0 current.

    Raises:
        BackendError: cuda-python is missing, or there is no NVIDIA GPU with a working driver.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            f"the Python package 'cuda.bindings' is needed here and cannot be imported: {error}",
            hint='pip install "cpm-edge[jetson]" on a Jetson, pip install "cpm-edge[rtx]" on a PC',
        ) from error
    cuda = Cuda(runtime)
    try:
        count = cuda.call("cudaGetDeviceCount")
    except Exception as error:  # the bindings raise errors of their own where a library is not found
        raise _no_gpu(str(error)) from error
    if not count:
        raise _no_gpu("CUDA counts 0 devices")
    cuda.call("cudaSetDevice", _DEVICE)
    return cuda


def _no_gpu(why: str) -> BackendError:
    return BackendError(
        f"no NVIDIA GPU can be used on this machine: {why}",
        hint="Run the bundle on the device it was exported for; for others export with --target ort or aipc.",
    )


class Cuda:
    """Checked calls, device and pinned memory, one stream at a time.

    Args:
        api: the module ``cuda.bindings.runtime``.
    """

    def __init__(self, api: Any) -> None:
        self.api = api

    def call(self, name: str, *arguments: Any) -> Any:
        """One function of the CUDA runtime; its single result, or None where it has none.

        Raises:
            BackendError: it does not return cudaSuccess.
        """
        status, *results = getattr(self.api, name)(*arguments)
        if int(status):
            raise BackendError(f"{name} failed: {self._text(status)}", hint=_hint(status))
        return results[0] if results else None

    def _text(self, status: Any) -> str:
        _, text = self.api.cudaGetErrorString(status)
        text = text.decode() if isinstance(text, bytes) else str(text)
        return f"{text} ({status.name})"

    def attribute(self, name: str) -> int:
        """A device attribute, such as cudaDevAttrIntegrated."""
        kind = getattr(self.api.cudaDeviceAttr, name)
        return int(self.call("cudaDeviceGetAttribute", kind, _DEVICE))

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of device memory. On a Jetson, free leaves out what the page cache gives."""
        _, free, total = self.api.cudaMemGetInfo()
        return int(free), int(total)

    def malloc(self, nbytes: int, what: str) -> DeviceMemory:
        """Device memory, not initialised.

        Raises:
            BackendError: there is not so much; with the numbers.
        """
        status, *results = self.api.cudaMalloc(nbytes)
        if int(status):
            free, total = self.memory()
            raise BackendError(
                f"no device memory for {what}: {size(nbytes)} asked, {size(free)} of {size(total)} free"
                + ("" if status.name == _OUT_OF_MEMORY else f" ({self._text(status)})"),
                hint="Close other programs and sessions, or export again with a smaller --max-context.",
            )
        return DeviceMemory(self, int(results[0]), nbytes)

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> PinnedArray:
        """Page-locked host memory as a numpy array, zeroed."""
        return PinnedArray(self, shape, np.dtype(dtype))

    def stream(self) -> Stream:
        """A new stream that does not wait for the default one."""
        return Stream(self)


class DeviceMemory:
    """A block of device memory; ``free`` gives it back, twice is harmless."""

    def __init__(self, cuda: Cuda, address: int, nbytes: int) -> None:
        self._cuda = cuda
        self.address = address
        self.nbytes = nbytes

    def free(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            self._cuda.call("cudaFree", address)


class PinnedArray:
    """Page-locked host memory.

    Attributes:
        array: the memory; it must not be used after ``free``.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._cuda = cuda
        self.nbytes = max(1, math.prod(shape) * dtype.itemsize)
        self.address = int(cuda.call("cudaHostAlloc", self.nbytes, 0))
        memory = memoryview((ctypes.c_uint8 * self.nbytes).from_address(self.address))
        count = math.prod(shape)
        self.array: npt.NDArray[Any] = np.frombuffer(memory, dtype, count).reshape(shape)
        self.array[...] = 0

    def free(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            self.array = np.empty(0, self.array.dtype)
            self._cuda.call("cudaFreeHost", address)


class Stream:
    """Work in order. Copies are asynchronous: their host memory must be pinned and stay until ``wait``."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._kinds = cuda.api.cudaMemcpyKind
        self._stream = cuda.call("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def upload(self, target: int, source: int, nbytes: int) -> None:
        """Copy host to device."""
        self._copy(target, source, nbytes, self._kinds.cudaMemcpyHostToDevice)

    def download(self, target: int, source: int, nbytes: int) -> None:
        """Copy device to host."""
        self._copy(target, source, nbytes, self._kinds.cudaMemcpyDeviceToHost)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy on the device."""
        self._copy(target, source, nbytes, self._kinds.cudaMemcpyDeviceToDevice)

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, nbytes, kind, self._stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy ``rows`` runs of ``width`` bytes on the device, one every ``pitch`` bytes."""
        kind = self._kinds.cudaMemcpyDeviceToDevice
        self._cuda.call(
            "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self._stream
        )

    def zero(self, target: int, nbytes: int) -> None:
        """Fill device memory with zeros."""
        self._cuda.call("cudaMemsetAsync", target, 0, nbytes, self._stream)

    def wait(self) -> None:
        """Until all work is done.

        Raises:
            BackendError: some of it failed.
        """
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def drain(self) -> None:
        """Wait without asking how it went: before memory is given back after a failure."""
        self._cuda.api.cudaStreamSynchronize(self._stream)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what ``work`` puts on this stream, without running it.

        Raises:
            BackendError: something in it cannot be captured; the stream is as before.
        """
        mode = self._cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # Ends the capture, which is invalid by now; the error that counts is the one underway.
            self._cuda.api.cudaStreamEndCapture(self._stream)
            raise
        graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        try:
            return CudaGraph(self._cuda, self._cuda.call("cudaGraphInstantiate", graph, 0), self._stream)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)

    def destroy(self) -> None:
        if self.handle:
            self.handle = 0
            self._cuda.call("cudaStreamDestroy", self._stream)


class CudaGraph:
    """Captured work, ready to be launched again and again on the addresses it was captured with."""

    def __init__(self, cuda: Cuda, executable: Any, stream: Any) -> None:
        self._cuda = cuda
        self._executable = executable
        self._stream = stream

    def launch(self) -> None:
        self._cuda.call("cudaGraphLaunch", self._executable, self._stream)

    def destroy(self) -> None:
        if self._executable is not None:
            executable, self._executable = self._executable, None
            self._cuda.call("cudaGraphExecDestroy", executable)


def size(nbytes: int) -> str:
    """Bytes for a person: 1.5 GiB, 300 MiB."""
    return f"{nbytes / (1 << 30):.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


def _hint(status: Any) -> str | None:
    if status.name == _OUT_OF_MEMORY:
        return "Close other programs and sessions, or export again with a smaller --max-context."
    if "Driver" in status.name or status.name == "cudaErrorNoDevice":
        return "Install the NVIDIA driver that the CUDA version of cuda-python needs (nvidia-smi shows both)."
    return None
