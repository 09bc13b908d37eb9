"""Weights that are inputs of an engine, read from the bundle into device memory once for all sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.cuda_runtime import Cuda, DeviceMemory, PinnedArray, Stream
from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.onnx_wire import ExternalTensor

ALIGNMENT = 256
_BLOCK = 16 << 20


class DeviceWeights:
    """One block of device memory with all of them.

    Attributes:
        addresses: by name, each a multiple of 256.

    Raises:
        BackendError: there is not enough device memory. BundleError: a file is shorter than its tensors.
    """

    def __init__(self, cuda: Cuda, stream: Stream, bundle: Bundle, tensors: Sequence[ExternalTensor]) -> None:
        self.addresses: dict[str, int] = {}
        self.nbytes = sum(_aligned(tensor.nbytes) for tensor in tensors)
        self._memory: DeviceMemory | None = None
        if not tensors:
            return
        self._memory = cuda.malloc(self.nbytes, "the weights")
        address = self._memory.address
        staging = cuda.pinned((_BLOCK,), "u1")
        try:
            for tensor in tensors:
                with bundle.file(tensor.location).open("rb", buffering=0) as file:
                    _upload(stream, file, tensor, address, staging)
                self.addresses[tensor.name] = address
                address += _aligned(tensor.nbytes)
        except BaseException:
            self.free()
            raise
        finally:
            staging.free()

    def free(self) -> None:
        if self._memory is not None:
            self._memory.free()
        self.addresses.clear()


def _upload(
    stream: Stream, file: BinaryIO, tensor: ExternalTensor, address: int, staging: PinnedArray
) -> None:
    file.seek(tensor.offset)
    left = tensor.nbytes
    while left:
        block = staging.array[: min(left, _BLOCK)].data
        count = file.readinto(block)  # type: ignore[attr-defined]  # unbuffered files have it
        if not count:
            raise BundleError(
                f"{tensor.location}: {tensor.name} ends {left} bytes behind the end of the file"
            )
        stream.upload(address, staging.address, count)
        stream.wait()  # before the next block overwrites the staging memory
        address, left = address + count, left - count


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
