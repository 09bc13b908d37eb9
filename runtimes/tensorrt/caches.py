"""Device memory of one session: caches of keys and values, and states of recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.runtimes.cuda_runtime import Cuda, CudaGraph, DeviceMemory, Stream
from cpm_edge.runtimes.tensorrt.io import CachePort, EngineIo, Kind


class DeviceCaches:
    """Buffers by port. A state that the engine does not write in place has two, which change roles.

    Attributes:
        graphs: captured decode steps by the addresses they were captured with.

    Raises:
        BackendError: there is not enough device memory.
    """

    def __init__(self, cuda: Cuda, stream: Stream, io: EngineIo) -> None:
        self._cuda, self._stream, self._io = cuda, stream, io
        self._buffers: dict[str, DeviceMemory] = {}
        self._spare: dict[str, DeviceMemory] = {}
        self.graphs: dict[tuple[int, ...], CudaGraph] = {}
        try:
            for port in io.caches:
                self._buffers[port.name] = self._zeroed(port)
                if port.kind is Kind.STATE:
                    self._spare[port.name] = self._zeroed(port)
            stream.wait()
        except BaseException:
            stream.drain()
            self.free()
            raise

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in (*self._buffers.values(), *self._spare.values()))

    def address(self, port: CachePort) -> int:
        """Of the contents that the next step reads."""
        return self._buffers[port.name].address

    def addresses(self) -> tuple[int, ...]:
        """All that a captured step depends on."""
        return tuple(self.address(port) for port in self._io.caches)

    def bindings(self) -> dict[str, int]:
        """Addresses by name of the engine's input or output."""
        bound = {}
        for port in self._io.caches:
            bound[port.input] = self.address(port)
            if port.kind is Kind.IN_PLACE:
                bound[port.output] = self.address(port)
            elif port.kind is Kind.STATE:
                bound[port.output] = self._spare[port.name].address
        return bound

    def swap_states(self) -> None:
        """After a step: what it wrote is what the next one reads."""
        for name, spare in self._spare.items():
            self._buffers[name], self._spare[name] = spare, self._buffers[name]

    def copy_from(self, other: DeviceCaches) -> None:
        """Take over the contents of another session."""
        for port in self._io.caches:
            self._stream.copy(self.address(port), other.address(port), port.nbytes)
        self._stream.wait()

    def read(self, port: CachePort) -> npt.NDArray[Any]:
        """A copy on the host, of the port's shape and type."""
        staging = self._cuda.pinned(port.shape, port.dtype)
        try:
            self._stream.download(staging.address, self.address(port), port.nbytes)
            self._stream.wait()
            return staging.array.copy()
        finally:
            staging.free()

    def write(self, port: CachePort, contents: npt.NDArray[Any] | None) -> None:
        """Replace a buffer's contents; None stands for zeros."""
        if contents is None:
            self._stream.zero(self.address(port), port.nbytes)
            self._stream.wait()
            return
        staging = self._cuda.pinned(port.shape, port.dtype)
        try:
            staging.array[...] = np.reshape(contents, port.shape)
            self._stream.upload(self.address(port), staging.address, port.nbytes)
            self._stream.wait()
        finally:
            staging.free()

    def free(self) -> None:
        for graph in self.graphs.values():
            graph.destroy()
        self.graphs.clear()
        for memory in (*self._buffers.values(), *self._spare.values()):
            memory.free()
        self._buffers.clear()
        self._spare.clear()

    def _zeroed(self, port: CachePort) -> DeviceMemory:
        # Unwritten rows are read too, behind a mask; NaN in them would come through.
        memory = self._cuda.malloc(port.nbytes, f"cache {port.name}")
        self._stream.zero(memory.address, port.nbytes)
        return memory
