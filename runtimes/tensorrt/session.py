"""One sequence on a TensorRT engine: its caches in device memory, sampling and snapshots on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpm_edge.runtimes.cache_layout import STATE
from cpm_edge.runtimes.session import FloatArray, Logits, Session, TokenArray
from cpm_edge.runtimes.snapshots import States
from cpm_edge.runtimes.tensorrt.caches import DeviceCaches
from cpm_edge.runtimes.tensorrt.io import CachePort

if TYPE_CHECKING:
    from cpm_edge.runtimes.tensorrt.engine import TensorRtEngine


class TensorRtSession(Session):
    """Caches have the engine's capacity from the beginning, whatever ``max_context`` is."""

    def __init__(self, engine: TensorRtEngine, caches: DeviceCaches) -> None:
        io = engine.io
        super().__init__(
            max_context=engine.max_context,
            vocab_size=io.vocab_size,
            prefill_chunk=lambda position: engine.chunk,
            state_bytes=sum(port.nbytes for port in io.states),
        )
        self._engine = engine
        self._caches = caches

    def cache_bytes(self) -> int:
        return self._caches.nbytes + self.snapshot_bytes()

    def layer_keys(self, layer: int) -> FloatArray:
        keys: FloatArray = self._read(self._port(f"{layer}.key"))[0, :, : self._cached].astype(np.float32)
        return keys

    def layer_state(self, layer: int) -> FloatArray:
        state: FloatArray = self._read(self._port(f"{layer}.{STATE}"))[0].astype(np.float32)
        return state

    def _port(self, name: str) -> CachePort:
        return next(port for port in self._engine.io.caches if port.name == name)

    def _read(self, port: CachePort) -> NDArray[Any]:
        self._check_open()
        with self._engine.stepper.lock:
            return self._caches.read(port)

    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        run = self._engine.stepper.run
        with self._engine.stepper.lock:
            if logits == "last":
                return run(tokens, self._cached, 1, self._caches).copy()
            rows = np.empty((len(tokens), self.vocab_size), np.float32)
            most = self._engine.io.logit_rows
            for start in range(0, len(tokens), most):
                part = tokens[start : start + most]
                rows[start : start + most] = run(part, self._cached + start, len(part), self._caches)
            return rows

    def _truncate(self, position: int) -> None:
        """Rows past the position are overwritten before they are read."""

    def _save_states(self) -> States:
        return [self._read(port) for port in self._engine.io.states]

    def _load_states(self, states: States | None) -> None:
        with self._engine.stepper.lock:
            for index, port in enumerate(self._engine.io.states):
                self._caches.write(port, None if states is None else states[index])

    def _clone(self) -> TensorRtSession:
        twin = self._engine.session()
        with self._engine.stepper.lock:
            twin._caches.copy_from(self._caches)
        return twin

    def _close(self) -> None:
        self._engine.give_back(self._caches)
