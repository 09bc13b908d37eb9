"""One step of an engine: tokens in, logits out, caches written, on one stream.

Sessions of an engine share its contexts and staging buffers, so steps run one at a time.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpm_edge.runtimes.cuda_runtime import Cuda, DeviceMemory, PinnedArray, Stream
from cpm_edge.runtimes.embedding import HostEmbedding
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.session import FloatArray, TokenArray
from cpm_edge.runtimes.tensorrt.api import Api
from cpm_edge.runtimes.tensorrt.build import DECODE, PREFILL, ROWS_INPUT
from cpm_edge.runtimes.tensorrt.caches import DeviceCaches
from cpm_edge.runtimes.tensorrt.contexts import Contexts
from cpm_edge.runtimes.tensorrt.io import LOGITS, PAST_LENGTH, EngineIo, Kind

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass
class _Staged:
    """An input or output: page-locked host memory, and its place on the device."""

    host: PinnedArray
    device: DeviceMemory

    @classmethod
    def of(cls, cuda: Cuda, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> _Staged:
        host = cuda.pinned(shape, dtype)
        try:
            return cls(host, cuda.malloc(host.nbytes, name))
        except BaseException:
            host.free()
            raise

    def free(self) -> None:
        self.host.free()
        self.device.free()


class Stepper:
    """Runs steps of all sessions of one engine.

    Args:
        embedding: gathers rows on the host; None where the engine takes token ids.
        weights: addresses of inputs that hold weights.
        uncapturable: why decode steps are not captured as a CUDA graph; None to capture them.

    Attributes:
        uncaptured: why they are not, None as long as they are.
        lock: held by everything that puts work on the stream; what another thread puts there during a capture
            would become part of the graph.
    """

    def __init__(
        self,
        api: Api,
        cuda: Cuda,
        stream: Stream,
        contexts: Contexts,
        io: EngineIo,
        embedding: HostEmbedding | None,
        weights: dict[str, int],
        uncapturable: str | None = None,
    ) -> None:
        self._api, self._stream, self._contexts, self._io = api, stream, contexts, io
        self._embedding = embedding
        self.uncaptured = uncapturable
        self.lock = threading.RLock()
        self._staged: dict[str, _Staged] = {}
        self._new_rows: dict[str, DeviceMemory] = {}
        try:
            self._allocate(cuda)
            for profile in (PREFILL, DECODE):
                self._bind_shared(contexts[profile], weights)
        except BaseException:
            self.free()
            raise

    def run(self, tokens: TokenArray, position: int, rows: int, caches: DeviceCaches) -> FloatArray:
        """Append tokens to the caches.

        Args:
            tokens: (T,), at most a chunk. position: rows that the caches hold.
            rows: logits of how many last tokens; 1 to min(T, io.logit_rows).

        Returns:
            float32 (rows, vocab), a view of a buffer that the next step reuses.

        Raises:
            BackendError: the engine failed; the caches hold what they held, states are undefined.
        """
        with self.lock:
            self._fill(tokens, position, rows)
            try:
                if len(tokens) == 1:
                    self._decode(caches)
                else:
                    self._prefill(len(tokens), rows, caches)
                self._append_rows(len(tokens), position, caches)
                self._stream.wait()
            except BackendError as error:
                self._stream.drain()
                raise BackendError(
                    f"{self._api.name} failed at position {position}: {error.message}", hint=error.hint
                ) from error
            caches.swap_states()
            logits: FloatArray = self._staged[LOGITS].host.array[:rows]
            return logits

    def free(self) -> None:
        for staged in self._staged.values():
            staged.free()
        for memory in self._new_rows.values():
            memory.free()
        self._staged.clear()
        self._new_rows.clear()

    def _allocate(self, cuda: Cuda) -> None:
        io = self._io
        width = () if io.width is None else (io.width,)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            io.tokens: ((io.chunk, *width), np.float16 if width else np.int32),
            PAST_LENGTH: ((1,), np.int32),
            ROWS_INPUT: ((io.logit_rows,), np.int32),
            LOGITS: ((io.logit_rows, io.vocab_size), np.float32),
        }
        for name, (shape, dtype) in shapes.items():
            self._staged[name] = _Staged.of(cuda, name, shape, dtype)
        for port in io.caches:
            if port.kind is Kind.ROWS:
                nbytes = port.shape[1] * io.chunk * port.row_bytes
                self._new_rows[port.output] = cuda.malloc(nbytes, f"new rows of {port.name}")

    def _bind_shared(self, context: trt.IExecutionContext, weights: dict[str, int]) -> None:
        addresses = {name: staged.device.address for name, staged in self._staged.items()}
        addresses |= {name: memory.address for name, memory in self._new_rows.items()}
        self._bind(context, addresses | weights)

    def _bind(self, context: trt.IExecutionContext, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(f"{name} cannot be bound{self._api.log.text()}")

    def _fill(self, tokens: TokenArray, position: int, rows: int) -> None:
        count = len(tokens)
        target = self._staged[self._io.tokens].host.array
        if self._embedding is None:
            target[:count] = tokens
        else:
            self._embedding.gather(tokens, target[:count])
        self._staged[PAST_LENGTH].host.array[0] = position
        self._staged[ROWS_INPUT].host.array[:rows] = np.arange(count - rows, count)

    def _prefill(self, count: int, rows: int, caches: DeviceCaches) -> None:
        context = self._contexts[PREFILL]
        width = () if self._io.width is None else (self._io.width,)
        for name, shape in ((self._io.tokens, (1, count, *width)), (ROWS_INPUT, (rows,))):
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{name} cannot have the shape {shape}{self._api.log.text()}")
        self._bind(context, caches.bindings())
        self._enqueue(context, count, rows)

    def _decode(self, caches: DeviceCaches) -> None:
        context, key = self._contexts[DECODE], caches.addresses()
        graph = caches.graphs.get(key)
        if graph is not None:
            graph.launch()
            return
        self._bind(context, caches.bindings())
        # TensorRT does work of its own in the first step after a change, which must not be captured.
        self._enqueue(context, 1, 1)
        self._stream.wait()
        if self.uncaptured is None:
            self._capture(context, key, caches)

    def _capture(self, context: trt.IExecutionContext, key: tuple[int, ...], caches: DeviceCaches) -> None:
        capturable = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX only
        try:
            if capturable is not None and not capturable(self._stream.handle):
                raise BackendError("the engine says that its stream cannot be captured")
            caches.graphs[key] = self._stream.capture(lambda: self._enqueue(context, 1, 1))
        except BackendError as error:
            self.uncaptured = error.message
            warnings.warn(
                f"decode runs without a CUDA graph, which is slower: {error.message}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _enqueue(self, context: trt.IExecutionContext, count: int, rows: int) -> None:
        used = {self._io.tokens: count, PAST_LENGTH: 1, ROWS_INPUT: rows}
        for name, length in used.items():
            staged = self._staged[name]
            nbytes = staged.host.array[:length].nbytes
            self._stream.upload(staged.device.address, staged.host.address, nbytes)
        self._api.log.clear()
        if not context.execute_async_v3(self._stream.handle):
            raise BackendError(f"the engine did not run{self._api.log.text()}", hint=_alias_hint(self._api))
        logits = self._staged[LOGITS]
        self._stream.download(logits.host.address, logits.device.address, logits.host.array[:rows].nbytes)

    def _append_rows(self, count: int, position: int, caches: DeviceCaches) -> None:
        """Behind the engine on the stream, outside of the graph: the target moves with the position."""
        for port in self._io.caches:
            if port.kind is Kind.ROWS:
                row, (_, heads, capacity, _) = port.row_bytes, port.shape
                self._stream.copy_rows(
                    target=caches.address(port) + position * row,
                    target_pitch=capacity * row,
                    source=self._new_rows[port.output].address,
                    source_pitch=count * row,
                    width=count * row,
                    rows=heads,
                )


def _alias_hint(api: Api) -> str | None:
    if api.log.has("alias"):
        return "Build the engine anew: cpm-run BUNDLE --build-only; see 'updated in place' in docs/jetson.md."
    return None
