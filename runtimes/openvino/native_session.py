"""A sequence on OpenVINO's native graph: our kernels, caches of fixed capacity that they write in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.session import NativeSession
from cpm_edge.runtimes.cache_layout import RecurrentLayout, kv_layers
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.openvino.front import RotaryTables
from cpm_edge.runtimes.session import FloatArray, Logits, Session, TokenArray
from cpm_edge.runtimes.snapshots import States
from cpm_edge.runtimes.sparsity import MlpSparsity

if TYPE_CHECKING:
    import openvino as ov

    from cpm_edge.runtimes.openvino.native import OpenVinoNativeEngine

FIRST_CAPACITY = 1024
PREFILL_CHUNK = 512
SPAWN = "Open the bundle in the process that uses it, and start processes with spawn instead of fork."


class OpenVinoNativeSession(Session):
    """One sequence. Cache buffers (kv heads, capacity, head_dim) double up to the context; the states of
    recurrent layers (heads, D, D) keep their size."""

    def __init__(self, engine: OpenVinoNativeEngine) -> None:
        manifest = engine.manifest
        self._recurrent = RecurrentLayout.of(manifest.cache)
        super().__init__(
            max_context=engine.max_context,
            vocab_size=manifest.vocab_size,
            prefill_chunk=lambda position: PREFILL_CHUNK,
            state_bytes=self._recurrent.nbytes if self._recurrent else 0,
        )
        self._engine = engine
        self._native = NativeSession(engine.threads, manifest.cache["layers"])
        self._address = np.array([self._native.address], np.uint64).view(np.uint8)
        self._prefill = engine.prefill.create_infer_request()
        self._values = engine.decode.values.array()
        self._rotary = engine.rotary and RotaryTables(engine.rotary, engine.decode.rotary_places)
        self._caches = {layer: engine.empty_cache() for layer in kv_layers(manifest.cache)}
        self._room = 0  # the capacity, at hand in every step
        self._states: list[FloatArray] = []
        if self._recurrent:
            for layer in self._recurrent.layers:
                self._states.append(np.zeros(self._recurrent.shape[1:], np.float32))
                self._native.set_state(layer, self._states[-1])
        self._reserve(min(FIRST_CAPACITY, self.max_context))

    def cache_bytes(self) -> int:
        held = sum(cache.nbytes for cache in self._caches.values())
        return held + sum(state.nbytes for state in self._states) + self.snapshot_bytes()

    @property
    def capacity(self) -> int:
        """Rows that the cache buffers hold now."""
        return min((cache.capacity for cache in self._caches.values()), default=0)

    def pooled_bytes(self) -> int:
        """How many of ``cache_bytes`` are pooled keys; 0 for dense models."""
        return sum(cache.pooled.nbytes for cache in self._caches.values() if cache.pooled is not None)

    def layer_keys(self, layer: int) -> FloatArray:
        keys: FloatArray = self._caches[layer].keys(0, self._cached)[0]
        return keys

    def layer_values(self, layer: int) -> FloatArray:
        """Values of one layer; see ``layer_keys``. Latent layers have none beside the keys."""
        values: FloatArray = self._caches[layer].values(0, self._cached)[0]
        return values

    def mlp_sparsity(self) -> MlpSparsity | None:
        try:
            counted = self._native.sparsity()
        except NativeError as error:
            self._check_open()
            raise BackendError(str(error), hint=SPAWN) from error
        if not counted.neurons:
            return None
        return MlpSparsity(counted.neurons, counted.active, counted.bytes, counted.read)

    def layer_state(self, layer: int) -> FloatArray:
        assert self._recurrent is not None
        return self._states[self._recurrent.layers.index(layer)].copy()

    def fill(
        self,
        token_ids: Sequence[int] | npt.NDArray[Any],
        rows_of_layer: Callable[[int], tuple[npt.NDArray[np.floating], ...]],
        state_of_layer: Callable[[int], FloatArray] | None = None,
    ) -> None:
        """Append tokens whose keys and values are known, without running the model.

        For prompt caches, and for measurements at positions that a prefill would take long to reach. The
        cache grows as in ``forward``, and sparse models get the pooled keys of every window that the rows
        complete. If one of the functions raises, the session is as before.

        Args:
            token_ids: (T,), T >= 1, as for ``forward``.
            rows_of_layer: called once for each layer with a cache; its keys (after RoPE) and values, floats
                (kv heads, T, head_dim). Latent layers have keys only.
            state_of_layer: called once for each recurrent layer; its state after these tokens, float32
                (heads, D, D).

        Raises:
            PromptError: token_ids is empty, not 1-D, not integer or out of range.
            ContextError: position + T > max_context.
            ValueError: rows or states of another shape, or recurrent layers and no ``state_of_layer``.
            BackendError: the session is closed.
        """
        self._check_open()
        tokens = self._check_tokens(token_ids)
        self._catch_up()
        states = self._given_states(state_of_layer)
        first, stop = self.position, self.position + len(tokens)
        self._reserve(stop)
        layout = self._engine.manifest.cache
        shape = (layout["kv_heads"], len(tokens), layout["head_dim"])
        parts = 1 if self._engine.spec.is_latent else 2
        for layer, cache in self._caches.items():
            given = rows_of_layer(layer)
            if [rows.shape for rows in given] != [shape] * parts:
                what = "keys alone," if parts == 1 else "keys and values"
                shapes = " and ".join(str(rows.shape) for rows in given)
                raise ValueError(f"layer {layer}: expected {what} {shape}, got {shapes}")
            keys, values = given[0][None], given[1][None] if parts == 2 else None
            cache.write(first, keys, values, self._engine.spec.kernel_size)
        self._tokens.extend(tokens.tolist())
        self._cached = stop
        if self._recurrent:
            self._load_states(states)
            self._keep_states()

    def _given_states(self, state_of_layer: Callable[[int], FloatArray] | None) -> States:
        if self._recurrent is None:
            return []
        if state_of_layer is None:
            raise ValueError("state_of_layer: the model has recurrent layers, whose states must be given too")
        states = [state_of_layer(layer) for layer in self._recurrent.layers]
        for layer, state in zip(self._recurrent.layers, states, strict=True):
            if state.shape != self._recurrent.shape[1:]:
                expected = self._recurrent.shape[1:]
                raise ValueError(f"layer {layer}: expected a state {expected}, got {state.shape}")
        return states

    def _reserve(self, rows: int) -> None:
        if rows <= self._room or not self._caches:
            return
        multiple = self._engine.manifest.cache["multiple_of"]
        wanted = -(-min(max(2 * self.capacity, rows), self.max_context) // multiple) * multiple
        try:
            for layer, cache in self._caches.items():
                grown = cache.resized(self._engine.spec, wanted)
                self._native.set_cache(layer, grown)
                self._caches[layer] = grown
            self._room = wanted
        except MemoryError as error:
            smaller = "" if self._engine.spec.is_latent else ", or export with --kv-cache int8"
            raise BackendError(
                f"there is no memory for a cache of {wanted} tokens",
                hint=f"Set a smaller max_context{smaller}.",
            ) from error

    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        try:
            if len(tokens) == 1:
                return self._decode(int(tokens[0]))
            with self._native.step():
                self._reserve(self._cached + len(tokens))
                first = 0 if logits == "all" else len(tokens) - 1
                inputs: dict[str, npt.NDArray[Any]] = {
                    "input_ids": tokens[None],
                    "past_length": np.array([self._cached], np.int64),
                    "logits_from": np.array([first], np.int64),
                    "session": self._address,
                }
                _bind(self._prefill, inputs)
                self._prefill.infer()
                rows: FloatArray = self._prefill.get_tensor("logits").data[0]
                return rows if logits == "all" else rows.copy()
        except NativeError as error:
            self._check_open()  # closed by another thread
            raise BackendError(str(error), hint=SPAWN) from error
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed at position {self._cached}: {error}") from error

    def _decode(self, token: int) -> FloatArray:
        decode = self._engine.decode
        logits = np.empty((1, decode.vocab_size), np.float32)
        with self._native.in_use():  # a close from another thread waits, from the caches to the logits
            self._reserve(self._cached + 1)
            offset, floats = decode.place
            self._values[offset : offset + floats] = decode.embedding.row(token)
            if self._rotary is not None:
                self._rotary.write(self._cached, self._values)
            decode.program.run(self._native, self._cached, self._values, logits)
        return logits

    def _truncate(self, position: int) -> None:
        """Rows past the position are overwritten before they are read."""

    def _save_states(self) -> States:
        return [state.copy() for state in self._states]

    def _load_states(self, states: States | None) -> None:
        for index, state in enumerate(self._states):
            # In place: the native session knows the address.
            state[...] = 0 if states is None else states[index]

    def _clone(self) -> OpenVinoNativeSession:
        twin = self._engine.session()
        twin._reserve(self.capacity)
        for layer, cache in self._caches.items():
            twin._caches[layer].copy_from(cache)
        twin._load_states(self._states)
        return twin

    def _close(self) -> None:
        # In this order: closing waits for a step in another thread, which uses all the others.
        self._native.close()
        del self._prefill, self._rotary
        self._caches.clear()
        self._states.clear()


def _bind(request: ov.InferRequest, inputs: dict[str, npt.NDArray[Any]]) -> None:
    """Let the request read these arrays, C-contiguous, at each inference; they must outlive it."""
    import openvino

    for name, array in inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
