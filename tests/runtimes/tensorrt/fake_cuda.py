"""``cuda.bindings.runtime`` in main memory: work on a stream is done when somebody waits for it.

Device memory is filled with NaN, every address is checked, and a captured graph keeps the addresses it was
captured with: what a wrong order, a missing wait or a stale graph does on a GPU shows in the numbers here.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

Work = Callable[[], None]


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900


class MemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


_SIDES = {1: ("host", "device"), 2: ("device", "host"), 3: ("device", "device")}
OK = Status.cudaSuccess


@dataclass
class Stream:
    number: int
    pending: list[Work] = field(default_factory=list)
    capturing: list[Work] | None = None
    broken: bool = False

    def __int__(self) -> int:
        return self.number


@dataclass
class Graph:
    work: list[Work]


class FakeCuda:
    """One device.

    Args:
        total: bytes of its memory. sm: compute capability. integrated: it shares main memory.

    Attributes:
        calls: names of the functions called, in order.
        refused: functions that return an error, by name.
    """

    cudaMemcpyKind = MemcpyKind
    cudaStreamNonBlocking = 1
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=2)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major",
        cudaDevAttrComputeCapabilityMinor="minor",
        cudaDevAttrIntegrated="integrated",
    )

    def __init__(self, total: int = 8 << 30, sm: int = 87, integrated: bool = True, count: int = 1) -> None:
        self.total = total
        self.facts = {"major": sm // 10, "minor": sm % 10, "integrated": int(integrated)}
        self.count = count
        self.calls: list[str] = []
        self.refused: dict[str, Status] = {}
        self.blocks: dict[str, dict[int, npt.NDArray[np.uint8]]] = {"device": {}, "host": {}}
        self.streams: dict[int, Stream] = {}
        self.graphs = 0

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not (name.startswith("cuda") and callable(value)) or isinstance(value, type):
            return value

        def called(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.refused:
                return (self.refused[name], None)
            return value(*arguments)

        return called

    @property
    def live(self) -> int:
        """Blocks, streams and graphs that were not given back."""
        return sum(map(len, self.blocks.values())) + len(self.streams) + self.graphs

    def view(self, address: int, nbytes: int, side: str = "device") -> npt.NDArray[np.uint8]:
        """Bytes of a live block; an address outside of all of them is an error."""
        for start, block in self.blocks[side].items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are in no {side} memory")

    def enqueue(self, stream: int, work: Work) -> None:
        """What a kernel launch does."""
        self._put(self.streams[stream], work)

    def cudaGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return OK, status.name.encode()

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (OK, self.count) if self.count else (Status.cudaErrorNoDevice, None)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return (OK,)

    def cudaDeviceGetAttribute(self, attribute: str, device: int) -> tuple[Any, ...]:
        return OK, self.facts[attribute]

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return OK, SimpleNamespace(name=b"Fake GPU\0\0")

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.total - self._used(), self.total

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:
        if self._used() + nbytes > self.total:
            return Status.cudaErrorMemoryAllocation, None
        return OK, self._allocate("device", nbytes)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        return OK, self._allocate("host", nbytes)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._free("device", address)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._free("host", address)

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: MemcpyKind, stream: Stream
    ) -> tuple[Any, ...]:
        return self.cudaMemcpy2DAsync(target, nbytes, source, nbytes, nbytes, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: MemcpyKind,
        stream: Stream,
    ) -> tuple[Any, ...]:
        if width > min(target_pitch, source_pitch):
            return (Status.cudaErrorInvalidValue,)
        source_side, target_side = _SIDES[kind]

        def work() -> None:
            for row in range(height):
                read = self.view(source + row * source_pitch, width, source_side)
                self.view(target + row * target_pitch, width, target_side)[:] = read

        return self._put(stream, work)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: Stream) -> tuple[Any, ...]:
        def work() -> None:
            self.view(address, nbytes)[:] = value

        return self._put(stream, work)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = Stream(len(self.streams) + 7)
        self.streams[stream.number] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Any, ...]:
        del self.streams[stream.number]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Any, ...]:
        if stream.capturing is not None:
            stream.broken = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        pending, stream.pending = stream.pending, []
        for work in pending:
            work()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[Any, ...]:
        assert not stream.pending and stream.capturing is None
        stream.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Any, ...]:
        assert stream.capturing is not None
        work, stream.capturing = stream.capturing, None
        broken, stream.broken = stream.broken, False
        if broken:
            return Status.cudaErrorStreamCaptureUnsupported, None
        self.graphs += 1
        return OK, Graph(work)

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> tuple[Any, ...]:
        self.graphs += 1
        return OK, Graph(list(graph.work))

    def cudaGraphDestroy(self, graph: Graph) -> tuple[Any, ...]:
        self.graphs -= 1
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Graph) -> tuple[Any, ...]:
        self.graphs -= 1
        return (OK,)

    def cudaGraphLaunch(self, graph: Graph, stream: Stream) -> tuple[Any, ...]:
        for work in graph.work:
            self._put(stream, work)
        return (OK,)

    def _put(self, stream: Stream, work: Work) -> tuple[Any, ...]:
        (stream.pending if stream.capturing is None else stream.capturing).append(work)
        return (OK,)

    def _used(self) -> int:
        return sum(len(block) for block in self.blocks["device"].values())

    def _allocate(self, side: str, nbytes: int) -> int:
        raw = np.full(nbytes + 256, 0xFF, np.uint8)  # NaN in every float type
        offset = -raw.ctypes.data % 256
        block = raw[offset : offset + nbytes]
        self.blocks[side][block.ctypes.data] = block
        return int(block.ctypes.data)

    def _free(self, side: str, address: int) -> tuple[Any, ...]:
        assert all(not stream.pending for stream in self.streams.values()), "freed under running work"
        block = self.blocks[side].pop(address)
        ctypes.memset(block.ctypes.data, 0xFF, len(block))
        return (OK,)
